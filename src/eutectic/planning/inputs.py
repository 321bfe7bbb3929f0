"""Everything a merge reads, opened: headers are known, no tensor has been read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from eutectic.checkpoint.experts import (
    Expert,
    FullExpert,
    expert_in_memory,
    is_adapter,
    open_expert,
)
from eutectic.checkpoint.hub import resolve
from eutectic.checkpoint.ia3 import identity_adapter, is_ia3, open_ia3
from eutectic.checkpoint.index import CheckpointIndex, open_index
from eutectic.checkpoint.memory import StateDictReader
from eutectic.checkpoint.reader import CheckpointReader
from eutectic.errors import EutecticError, Fault, MethodError, RecipeError, suggest
from eutectic.methods import get_method
from eutectic.methods.initial import ZERO
from eutectic.methods.registry import all_methods
from eutectic.recipes.load import Source
from eutectic.recipes.schema import Recipe
from eutectic.types import LayerStatistics, Statistics, as_statistics

BaseReader = CheckpointReader | StateDictReader


@dataclass(frozen=True)
class Inputs:
    """The opened base, experts and statistics of one merge. A context manager that closes them.

    Attributes:
        base: reader of the base's tensors; where the experts are (IA)³ adapters, the adapter
            that changes nothing.
        index: the base's folder and layout (the first adapter's), or None in memory.
        experts: name -> expert, in the recipe's order.
        statistics: name -> statistics, for experts that have a file.
        initial: a merged checkpoint that an iterative method starts from.
        stated: the base's configuration, in memory.
    """

    base: BaseReader
    index: CheckpointIndex | None
    experts: Mapping[str, Expert]
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    initial: Expert | None = None
    stated: Mapping[str, Any] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)

    @property
    def config(self) -> Mapping[str, Any]:
        """The base's config.json, or what was stated in memory."""
        return self.stated if self.index is None else self.index.config

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def open_inputs(recipe: Recipe, source: Source | None = None) -> Inputs:
    """Open everything that a recipe names; read headers only.

    Raises:
        RecipeError: listing every input that cannot be opened.
    """
    source = source or Source()
    with ExitStack() as stack:
        try:
            index = open_index(resolve(recipe.base))
        except (EutecticError, OSError) as error:
            raise RecipeError(
                [
                    Fault("unusable_base", str(error), "base", source.line("base")),
                    *_other_faults(recipe, source),
                ],
                source.name,
            ) from None
        base: BaseReader = stack.enter_context(CheckpointReader(index))
        faults: list[Fault] = []
        vectors = _only_vectors(recipe)
        if vectors:
            try:
                tables = {name: open_ia3(path) for name, path in vectors.items()}
                base, index = identity_adapter(tables, base)
            except (EutecticError, OSError) as error:
                fault = Fault("unusable_expert", str(error), line=source.line("experts"))
                raise RecipeError([fault], source.name) from None
        experts: dict[str, Expert] = {}
        statistics: dict[str, Statistics] = {}
        for name, spec in recipe.experts.items():
            try:
                experts[name] = _open_expert(resolve(spec.path), index, bool(vectors))
                stack.callback(experts[name].close)
            except (EutecticError, OSError) as error:
                faults.append(_unusable(name, error, source))
            if spec.statistics is None:
                continue
            try:
                from eutectic.statistics import load_statistics

                statistics[name] = load_statistics(spec.statistics)
            except EutecticError as error:
                line, where = source.line("experts", name), f"statistics of '{name}'"
                faults.append(Fault("unusable_statistics", str(error), where, line))
        initial = _open_initial(recipe, index, bool(vectors), source, faults)
        if initial is not None:
            stack.callback(initial.close)
        if faults:
            raise RecipeError(faults, source.name)
        return Inputs(base, index, experts, statistics, initial, _stack=stack.pop_all())


def in_memory_inputs(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    statistics: Mapping[str, Statistics | Mapping[str, LayerStatistics]],
    config: Mapping[str, Any] | None = None,
) -> Inputs:
    """Wrap state dicts in the surface that files have."""
    reader = StateDictReader(base, "the base")
    opened = {
        name: expert_in_memory(tensors, reader.entries, f"expert '{name}'")
        for name, tensors in experts.items()
    }
    wrapped = {name: as_statistics(given) for name, given in statistics.items()}
    return Inputs(reader, None, opened, wrapped, stated=config or {})


def _only_vectors(recipe: Recipe) -> dict[str, Path]:
    """Return the experts' folders if all are (IA)³ adapters, else nothing."""
    try:
        paths = {name: resolve(spec.path) for name, spec in recipe.experts.items()}
        return paths if all(is_ia3(path) for path in paths.values()) else {}
    except (EutecticError, OSError):
        return {}  # reported expert by expert


def _open_expert(path: Path, index: CheckpointIndex, vectors: bool) -> Expert:
    if not vectors:
        return open_expert(path, index)
    table = open_ia3(path)
    return FullExpert(
        CheckpointReader(table), index.entries, label=str(path), config=table.config, folder=path
    )


def _unusable(name: str, error: Exception, source: Source) -> Fault:
    line = source.line("experts", name)
    return Fault("unusable_expert", str(error), f"expert '{name}'", line)


def _other_faults(recipe: Recipe, source: Source) -> list[Fault]:
    """Open the experts by themselves, so that their faults are not hidden by the base's."""
    faults: list[Fault] = []
    for name, spec in recipe.experts.items():
        try:
            path = resolve(spec.path)
            if not is_adapter(path):
                open_index(path)
        except (EutecticError, OSError) as error:
            faults.append(_unusable(name, error, source))
    return faults


def _open_initial(
    recipe: Recipe, index: CheckpointIndex, vectors: bool, source: Source, faults: list[Fault]
) -> Expert | None:
    """Open `parameters.init` where it names a checkpoint instead of a method."""
    init = recipe.parameters.get("init")
    if not isinstance(init, str):
        return None
    try:
        get_method(init)
        return None
    except MethodError:
        path = Path(init)
    if init == ZERO:
        return None
    line = source.line("parameters", "init")
    if not path.exists():
        what = f"init '{init}' is no method, not '{ZERO}', and no checkpoint either."
        nearest = suggest(init, list(all_methods()))
        faults.append(Fault("unknown_init", what, line=line, next=nearest))
        return None
    try:
        return _open_expert(path, index, vectors)
    except EutecticError as error:
        faults.append(Fault("unusable_init", str(error), "init", line))
        return None
