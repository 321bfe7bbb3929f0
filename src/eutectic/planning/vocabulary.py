"""The vocabulary of an output, by a policy or by the rows' numbers, and what is told of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from eutectic.checkpoint.expert_tensors import Expert
from eutectic.checkpoint.index import CheckpointIndex
from eutectic.conventions_vocabulary import (
    is_table_of_tokens,
    may_have_rows_of_tokens,
)
from eutectic.errors import CheckpointError, Fault, Note
from eutectic.planning.inputs import Inputs
from eutectic.planning.table_rows import PlannedVocabulary, height_of, rows_in, tables_of
from eutectic.recipes.document import Source as Document
from eutectic.recipes.schema import Recipe, ScaleSearch
from eutectic.vocabulary.agreement import BASE, agree, conflicts
from eutectic.vocabulary.chat_templates import (
    AUTO,
    BUILT_IN,
    most_common,
    template_fault,
    template_of,
)
from eutectic.vocabulary.tokenizer_files import unwritable
from eutectic.vocabulary.tokens import Tokens, files_identity, read_tokens, tokens_of_gguf


@dataclass(frozen=True)
class Found:
    """What planning found of vocabularies."""

    planned: PlannedVocabulary | None = None  # None where every row stays where it is
    faults: tuple[Fault, ...] = ()
    notes: tuple[Note, ...] = ()
    chat_template: str | None = None  # Jinja to be written; None leaves the tokenizer's


def find_vocabulary(recipe: Recipe, inputs: Inputs, document: Document) -> Found:
    """Return the vocabulary of a recipe's output, what is wrong with it, and what is to be told.

    Without a policy, or with `error`, rows are matched by their number; rows that stand for
    different tokens are told, or refused.
    """
    found = _find(recipe, inputs, document)
    template = _template(recipe, inputs, document)
    return replace(
        found,
        faults=(*found.faults, *template.faults),
        notes=(*found.notes, *template.notes),
        chat_template=template.chat_template,
    )


def _find(recipe: Recipe, inputs: Inputs, document: Document) -> Found:
    policy = recipe.vocabulary
    line = document.line("vocabulary")
    if policy is None or policy.source == "error":
        return _by_number(inputs, refused=policy is not None, line=line)
    if inputs.index is None:
        what = "state dicts come without tokenizers, so that no row is known by its token."
        where = "vocabulary"
        return Found(faults=(Fault("no_tokenizer", what, where, line, next="Merge folders."),))
    height, tensors = tables_of(inputs.base.entries, inputs.index)
    if inputs.rows:  # the output layer may be another model's than the table
        held = inputs.base.entries
        sizes = {rows_in(e.shape) for n, e in held.items() if is_table_of_tokens(n)}
        likely = {n: rows_in(e.shape) for n, e in held.items() if may_have_rows_of_tokens(n)}
        tensors |= {name for name, rows in likely.items() if rows in sizes}
    if not tensors:
        what = "the base has no table of tokens."
        return Found(faults=(Fault("no_tables", what, "vocabulary", line),))
    faults: list[Fault] = []
    models: dict[str, Tokens | None] = {}
    folders = dict(_folders(inputs))
    for name, folder in folders.items():
        try:
            models[name] = None if folder is None else read_tokens(folder)
            if models[name] is None:
                models[name] = _of_gguf(name, inputs)
        except CheckpointError as error:
            whose = "base" if name == BASE else f"expert '{name}'"
            faults.append(Fault("unusable_tokenizer", str(error), whose, line))
    if faults:
        return Found(faults=tuple(faults))
    heights = {BASE: height}
    for name, expert in _experts(inputs):
        heights[name] = height_of(expert, tensors, height)
    agreed = agree(policy, models, heights)
    if isinstance(agreed, list):
        return Found(faults=tuple(replace(fault, line=line) for fault in agreed))
    search = recipe.scale if isinstance(recipe.scale, ScaleSearch) else None
    moved = agreed.renumbered or agreed.size != height or agreed.donor != BASE
    if search is not None and search.search != "gram" and moved:
        what = f"search: {search.search} runs the base's model, whose tables have other rows."
        choose = "State a number, choose search: gram, or vocabulary: base."
        return Found(faults=(Fault("search_of_vocabulary", what, "scale", line, next=choose),))
    based = recipe.script is None or recipe.script.based
    known = {name: folder for name, folder in folders.items() if folder is not None}
    if why := unwritable(agreed, known[agreed.donor]):
        what = f"the tokenizer of '{agreed.donor}' cannot be written with other tokens: {why}."
        choose = "Save it with transformers (save_pretrained), or choose base or an expert's name."
        return Found(faults=(Fault("unwritable", what, "vocabulary", line, next=choose),))
    planned = PlannedVocabulary(agreed, tensors, height, based, known)
    return Found(planned, notes=tuple(_notes(planned)))


def _template(recipe: Recipe, inputs: Inputs, document: Document) -> Found:
    """Return the chat template that the output gets, if the recipe names one."""
    asked, line = recipe.chat_template, document.line("chat_template")
    if asked is None:
        return Found()
    if fault := template_fault(asked, line):
        return Found(faults=(fault,))
    if inputs.index is None:
        what = "state dicts have no tokenizer to put a chat template beside."
        return Found(faults=(Fault("no_tokenizer", what, "chat_template", line),))
    if asked != AUTO:
        return Found(chat_template=BUILT_IN.get(asked, asked))
    try:
        folders = [(n, f) for n, f in _folders(inputs) if f is not None and n != "initial"]
        chosen = most_common({name: template_of(folder) for name, folder in folders})
    except CheckpointError as error:
        return Found(faults=(Fault("unusable_template", str(error), "chat_template", line),))
    if chosen is None:
        return Found(notes=(Note("no_template"),))
    template, owners = chosen
    return Found(notes=(Note("template", tuple(owners)),), chat_template=template)


def _folders(inputs: Inputs) -> Iterator[tuple[str, Path | None]]:
    """Yield the base and the experts with the folders of their tokenizers."""
    index = inputs.index
    yield BASE, None if index is None else _tokenizer_folder(index.folder, index)
    for name, expert in _experts(inputs):
        own = getattr(expert.source, "index", None)
        yield name, None if expert.folder is None else _tokenizer_folder(expert.folder, own)


def _of_gguf(name: str, inputs: Inputs) -> Tokens | None:
    """Return the tokens that a GGUF file lists itself."""
    index = inputs.index
    if name != BASE:
        expert = dict(_experts(inputs))[name]
        index = getattr(expert.source, "index", None)
    table = None if index is None else index.gguf
    return None if table is None else tokens_of_gguf(table.tokenizer)


def _tokenizer_folder(folder: Path, index: CheckpointIndex | None) -> Path:
    """Return the folder of a model's tokenizer: its own, or that of the transformer in it."""
    if index is None or (folder / "tokenizer_config.json").is_file():
        return folder
    inner = next((m.folder for m in index.modules if m.transformer), "")
    return folder / inner if inner else folder


def _experts(inputs: Inputs) -> list[tuple[str, Expert]]:
    initial = [] if inputs.initial is None else [("initial", inputs.initial)]
    return [*inputs.experts.items(), *initial]


def _by_number(inputs: Inputs, *, refused: bool, line: int) -> Found:
    """Look for rows that stand for different tokens, where rows are matched by their number."""
    if inputs.index is None or not tables_of(inputs.base.entries, inputs.index)[1]:
        return Found()
    if inputs.rows:
        held = inputs.base.entries
        sizes = {n: rows_in(e.shape) for n, e in held.items() if is_table_of_tokens(n)}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{rows:,} in '{name}'" for name, rows in sizes.items())
            what = f"the tables of tokens are of models with different numbers of rows: {listed}."
            choose = (
                "Match their rows by tokens (vocabulary: union, or tokenizer: {source: union})."
            )
            return Found(faults=(Fault("table_size", what, "vocabulary", line, next=choose),))
    folders = [(name, folder) for name, folder in _folders(inputs) if folder is not None]
    try:
        identities = {name: files_identity(folder) for name, folder in folders}
        if not identities.get(BASE) or len({i for i in identities.values() if i}) < 2:
            return Found()
        read: dict[str, Tokens | None] = {}  # identity -> tokens
        models: dict[str, Tokens | None] = {}
        for name, folder in folders:
            key = identities[name]
            if key not in read:
                read[key] = read_tokens(folder) if key else None
            models[name] = read[key]
        found = conflicts(models)
    except CheckpointError as error:
        if not refused:
            return Found()  # nobody asked for tokens, and rows are where they are
        return Found(faults=(Fault("unusable_tokenizer", str(error), "vocabulary", line),))
    notes = [
        Note(
            "other_tokens",
            (name,),
            {"count": len(rows), "row": rows[0][0], "base": rows[0][1], "own": rows[0][2]},
            "warning",
        )
        for name, rows in found.items()
    ]
    if refused:
        choose = "Choose vocabulary: union, base, intersection or an expert's name."
        faults = [Fault("other_tokens", note.text, line=line, next=choose) for note in notes]
        return Found(faults=tuple(faults))
    return Found(notes=tuple(notes))


def _notes(planned: PlannedVocabulary) -> Iterator[Note]:
    """Yield what a user should know of the output's vocabulary."""
    agreed = planned.agreed
    numbers = {
        "policy": agreed.policy.source,
        "tokens": len(agreed.rows),
        "rows": agreed.size,
        "before": planned.height,
    }
    yield Note("vocabulary", (), numbers)
    if agreed.new:
        owners = Counter(agreed.new.values())
        told = {"count": len(agreed.new), "owners": dict(owners)}
        yield Note("tokens_added", tuple(agreed.new), told)
    if agreed.created:
        yield Note("tokens_created", agreed.created)
    if agreed.removed:
        yield Note("tokens_removed", agreed.removed, {"count": len(agreed.removed)})
    if agreed.assumed:
        yield Note("tokenizer_assumed", agreed.assumed)
    absent: set[str] = set(agreed.rows)
    for name in agreed.models:
        lacking = agreed.lacking(name)
        absent &= set(lacking)
        if name == BASE:
            lacking = [token for token in lacking if token not in agreed.new]
        if lacking:
            told = {"model": name, "count": len(lacking)}
            yield Note("tokens_lacking", tuple(lacking), told)
    # A rule that asks for zeros, or for the row of another token, says what it wants.
    said = {t for t, rule in agreed.policy.tokens.items() if rule.source != "mean"}
    nowhere = tuple(t for t in agreed.rows if t in absent and t not in said)
    if nowhere:
        yield Note("tokens_without_row", nowhere, {"count": len(nowhere)}, "warning")
