"""Several configurations in one file: stages, of which later ones merge what others wrote.

A document with a `name` is known to the others by it, as mergekit-multi has it; the one that no
other reads is the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from eutectic.errors import Fault, RecipeError
from eutectic.recipes.document import Document, Source, by_line, read_documents
from eutectic.recipes.mergekit import check_mergekit
from eutectic.recipes.mergekit_document import is_mergekit
from eutectic.recipes.schema import Name, Recipe


@dataclass(frozen=True)
class Stage:
    """One document of a file of several."""

    name: str  # "" where it has none: the output
    values: Mapping[str, Any]
    source: Source
    faults: tuple[Fault, ...]  # found while it was read
    reads: tuple[str, ...]  # stages whose outputs it merges


def read_stages(path: str | Path) -> tuple[Stage, ...]:
    """Return the stages of a file in an order in which each finds what it reads; the output last.

    Empty for a file of one document. RecipeError where names are used twice, stages wait for each
    other, or it is not clear which of them is the output.
    """
    documents = read_documents(path, "a recipe", "base, experts and method")
    if len(documents) < 2:
        return ()
    source = documents[0][1]
    faults = [
        Fault(
            "several_documents",
            "only mergekit's configurations stand several in a file.",
            line=own.start,
        )
        for values, own, _ in documents
        if not is_mergekit(values)
    ]
    names = [str(values.get("name") or "") for values, _, _ in documents]
    faults += _name_faults(names, documents)
    if faults:
        raise RecipeError(by_line(faults), source.name)
    stages = [
        Stage(name, values, own, tuple(twice), _reads(values, set(names) - {"", name}))
        for name, (values, own, twice) in zip(names, documents, strict=True)
    ]
    return _ordered(stages, source)


def _name_faults(names: Sequence[str], documents: Sequence[Document]) -> list[Fault]:
    from pydantic import TypeAdapter, ValidationError

    faults: list[Fault] = []
    for position, (name, (_, own, _)) in enumerate(zip(names, documents, strict=True)):
        line = own.line("name") or own.start
        if name in names[:position]:
            what = f"two stages are called '{name}'." if name else "two stages have no name."
            faults.append(Fault("stage_name", what, line=line, next="Name them apart."))
        try:
            TypeAdapter(Name).validate_python(name or "output")
        except ValidationError:
            what = "a stage's name becomes that of a folder: letters, digits and . _ + - only."
            faults.append(Fault("stage_name", what, "name", line, got=name))
    return faults


def _reads(value: object, names: set[str]) -> tuple[str, ...]:
    """Return the names of stages that stand as models anywhere in a document."""
    found: dict[str, None] = {}

    def visit(value: object, key: str) -> None:
        if isinstance(value, Mapping):
            for inner, item in cast("Mapping[object, object]", value).items():
                visit(item, str(inner))
        elif isinstance(value, (list, tuple)):
            for item in cast("Sequence[object]", value):
                visit(item, key)
        elif isinstance(value, str) and key in _MODEL_KEYS:
            name = value.partition("+")[0]
            if name in names:
                found[name] = None

    visit(value, "")
    return tuple(found)


_MODEL_KEYS = {"model", "models", "base_model", "path", "source", "sources", "tokenizer_source"}


def _ordered(stages: Sequence[Stage], source: Source) -> tuple[Stage, ...]:
    waiting, done = list(stages), list[Stage]()
    while waiting:
        names = {stage.name for stage in done}
        ready = [stage for stage in waiting if names.issuperset(stage.reads)]
        if not ready:
            listed = ", ".join(f"'{stage.name or 'the output'}'" for stage in waiting)
            what = f"stages wait for each other: {listed}."
            raise RecipeError(
                [Fault("stages_in_a_circle", what, line=waiting[0].source.start)], source.name
            )
        done += ready
        waiting = [stage for stage in waiting if stage not in ready]
    read = {name for stage in stages for name in stage.reads}
    last = [s for s in stages if not s.name] or [s for s in stages if s.name not in read]
    if len(last) != 1:
        listed = ", ".join(f"'{stage.name}'" for stage in last)
        what = f"no other stage reads {listed}, so that it is not clear which is the output."
        choose = "Leave the name out of the one that is."
        line = last[0].source.start
        raise RecipeError([Fault("stages_output", what, line=line, next=choose)], source.name)
    return (*(s for s in done if s is not last[0]), last[0])


def check_stages(
    stages: Sequence[Stage], folder: Path, options: Mapping[str, Any]
) -> list[tuple[Stage, Recipe]]:
    """Return every stage with its checked recipe, whose stages write into `folder`.

    RecipeError lists the faults of all of them.
    """
    outputs = {stage.name: str(folder / stage.name) for stage in stages[:-1]}
    checked: list[tuple[Stage, Recipe]] = []
    faults: list[Fault] = []
    for stage in stages:
        known = {name: outputs[name] for name in stage.reads}
        try:
            recipe = check_mergekit(stage.values, stage.source, stage.faults, options, known)
            checked.append((stage, recipe))
        except RecipeError as error:
            faults += error.faults
    if faults:
        raise RecipeError(by_line(faults), stages[0].source.name)
    return checked
