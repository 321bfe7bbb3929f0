"""What a plan is made from: a recipe, and everything it reads, opened; no tensor has been read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from eutectic.checkpoint.adapted import open_adapted
from eutectic.checkpoint.expert_tensors import Expert, as_expert, full_expert
from eutectic.checkpoint.experts import common_base, is_adapter, is_ia3, open_expert
from eutectic.checkpoint.folder import check_side_files
from eutectic.checkpoint.index import CheckpointIndex, open_index
from eutectic.checkpoint.locating import locate
from eutectic.checkpoint.opening import logical_tensors
from eutectic.checkpoint.reader import CheckpointSource, StateDictReader, TensorSource
from eutectic.conventions_stacks import belongs_to
from eutectic.errors import CheckpointError, EutecticError, Fault, Note, RecipeError, suggest
from eutectic.methods import Method, Post
from eutectic.methods.registry import all_methods
from eutectic.methods.solving import ZERO
from eutectic.planning.collector import collector_paused
from eutectic.planning.outline import Row, Rows, depth_in, restack, rows_of
from eutectic.planning.tensor_plan import Source
from eutectic.planning.ties import Ties
from eutectic.recipes.document import Source as Document
from eutectic.recipes.schema import Recipe
from eutectic.recipes.script import Place, Script
from eutectic.storage import is_url, view_once
from eutectic.types import LayerStatistics, Statistics, as_statistics


@dataclass(frozen=True)
class InputPaths:
    """Where the inputs of a merge lie: enough to open them again in another process."""

    base: Path  # folder or file of the base
    experts: Mapping[str, Path]  # name -> folder or file, in the recipe's order
    statistics: Mapping[str, str]  # name -> statistics file, for experts that have one
    initial: Path | None = None  # a merged checkpoint that an iterative method starts from
    # "base" or an expert's name -> the adapter that is merged into it first
    adapters: Mapping[str, Path] = field(default_factory=dict[str, Path])
    # models that only lend layers to the base of an output of several models' layers
    bases: Mapping[str, Path] = field(default_factory=dict[str, Path])
    rows: Rows = field(default_factory=dict[str, Row])  # of such an output; empty for others

    def here(self) -> InputPaths:
        """Return the same on this machine, where object stores are looked at for the first time."""

        def shown(paths: Mapping[str, Path]) -> dict[str, Path]:
            return {name: view_once(path) for name, path in paths.items()}

        return replace(
            self,
            base=view_once(self.base),
            experts=shown(self.experts),
            initial=None if self.initial is None else view_once(self.initial),
            adapters=shown(self.adapters),
            bases=shown(self.bases),
        )

    def absolute(self) -> InputPaths:
        """Return the same for a process that works in another folder."""

        def each(paths: Mapping[str, Path]) -> dict[str, Path]:
            return {name: path.absolute() for name, path in paths.items()}

        return replace(
            self,
            base=self.base.absolute(),
            experts=each(self.experts),
            statistics={
                name: path if "://" in path else str(Path(path).absolute())
                for name, path in self.statistics.items()
            },
            initial=None if self.initial is None else self.initial.absolute(),
            adapters=each(self.adapters),
            bases=each(self.bases),
        )


@dataclass(frozen=True)
class Inputs:
    """The opened base, experts and statistics of one merge. A context manager that closes them."""

    base: TensorSource  # where the experts are (IA)³ adapters, the adapter that changes nothing
    index: CheckpointIndex | None  # of the base's folder (or first adapter's); None in memory
    experts: Mapping[str, Expert]  # name -> expert, in the recipe's order
    statistics: Mapping[str, Statistics] = field(default_factory=dict)  # of experts with some
    initial: Expert | None = None  # a merged checkpoint that an iterative method starts from
    stated: Mapping[str, Any] = field(default_factory=dict)  # the base's configuration, in memory
    paths: InputPaths | None = None  # where all of it lies; None in memory
    notes: tuple[Note, ...] = ()  # of where they were found
    device: str = "cpu"  # where methods are given what is read from here
    rows: Rows = field(default_factory=dict[str, Row])  # where layers of several models come from
    # model -> its own configuration, of models that only lend layers to the base
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, "Mapping[str, Any]"])
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)

    @property
    def config(self) -> Mapping[str, Any]:
        """The base's config.json, or what was stated in memory."""
        return self.stated if self.index is None else self.index.config

    def owner(self, source: Source) -> Expert:
        """Return the expert, the base or the initial checkpoint that a source belongs to."""
        if source.owner == "base":
            return as_expert(self.base, "the base", self.config)
        if source.owner != "initial":
            return self.experts[source.owner]
        assert self.initial is not None
        return self.initial

    def __enter__(self) -> Inputs:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@dataclass(frozen=True)
class MergeRequest:
    """A recipe with its inputs. Planning reads it; nothing that runs afterwards does."""

    recipe: Recipe
    inputs: Inputs  # base, experts and statistics, of which headers are known
    document: Document  # where the recipe was written, for the lines of faults
    method: Method
    parameters: Any  # its checked parameters
    scale: float  # α where no rule says otherwise; while it is to be searched, the method's default
    own_parameters: Mapping[str, Any]  # of experts that have some of their own
    ties: Ties  # which tensors are one under several names, and where each checkpoint keeps it
    # expert -> base name (with the part of a packed tensor) -> name in its statistics
    statistics_names: Mapping[str, Mapping[str, str]]
    depths: Mapping[str, int] = field(default_factory=dict[str, int])  # stack -> layers in the base
    post: Post | None = None  # what follows the merge of every matrix

    @property
    def script(self) -> Script | None:
        """What the recipe says of single tensors; None where it says the same of all."""
        return self.recipe.script

    def taking(self, name: str) -> Mapping[str, Expert]:
        """Return the experts that a tensor of the output is merged from, if they have it."""
        experts = self.inputs.experts
        if self.script is None:
            return experts
        own = self.place(name).own
        return {owner: expert for owner, expert in experts.items() if owner in own}

    def place(self, name: str) -> Place:
        """Return where a tensor of the output stands, and which experts it is merged from."""
        script, rows = self.script, self.inputs.rows
        if name in rows:
            return rows[name].place
        if script is None:
            return Place(name, dict.fromkeys(self.inputs.experts, name))
        part = next((part for part in script.takes if belongs_to(name, part)), None)
        takers = () if part is None else script.takes[part]
        depth = depth_in(name, self.depths)
        return Place(name, dict.fromkeys(takers, name), depth, part or "")


@collector_paused()
def open_inputs(recipe: Recipe, document: Document | None = None) -> Inputs:
    """Open everything that a recipe names; read headers only."""
    document = document or Document()
    paths: dict[str, Path] = {}
    experts: dict[str, Expert] = {}
    statistics: dict[str, Statistics] = {}
    adapters: dict[str, Path] = {}
    faults: list[Fault] = []
    notes: list[Note] = []

    @contextmanager
    def told(kind: str, what: str, *location: str) -> Iterator[None]:
        try:
            yield
        except (EutecticError, OSError) as error:
            faults.append(Fault(f"unusable_{kind}", str(error), what, document.line(*location)))

    with ExitStack() as stack:
        for name, spec in recipe.experts.items():
            with told("expert", f"expert '{name}'", "experts", name):
                found = locate(spec.path)
                is_ia3(found.path)  # a broken configuration is a fault of this expert alone
                paths[name] = found.path
                notes += found.notes(f"expert '{name}'")
                if spec.adapter is not None:
                    adapters[name] = locate(spec.adapter).path
        place, readers = Path(), list[CheckpointSource]()
        with told("base", "base", "base"):
            found = locate(recipe.reference, full=True)
            place = found.path
            notes += found.notes("base")
            lent = next(iter(recipe.experts.values())).adapter if recipe.base is None else None
            if adapter := recipe.base_adapter or lent:
                adapters["base"] = locate(adapter).path
            opened = open_adapted(place, adapters.get("base"))
            stack.callback(opened.close)
            readers.append(opened)
        bases: dict[str, Path] = {}
        for name, path in (recipe.script.bases if recipe.script else {}).items():
            with told("base", f"base '{name}'", "base_model"):
                bases[name] = locate(path, full=True).path
        if not readers:
            for name, path in paths.items():  # their faults are not hidden by the base's
                with told("expert", f"expert '{name}'", "experts", name):
                    None if is_adapter(path) else open_index(path)
            raise RecipeError(faults, document.name)
        all_found = len(paths) == len(recipe.experts)
        base, index = readers[0], readers[0].index
        with told("expert", "", "experts"):
            plain = {} if recipe.script or adapters or not all_found else paths
            base, index = common_base(readers[0], plain)
        if faults and all_found:
            raise RecipeError(faults, document.name)
        for name, spec in recipe.experts.items():
            if name in paths:
                with told("expert", f"expert '{name}'", "experts", name):
                    experts[name] = _opened(paths[name], adapters.get(name), index, base)
                    stack.callback(experts[name].close)
            if spec.statistics is not None:
                with told("statistics", f"statistics of '{name}'", "experts", name):
                    statistics[name] = _load_statistics(spec.statistics)
        donor = experts[recipe.side_files] if recipe.side_files in experts else None
        with told("side_files", "side_files", "side_files"):
            folder = None if donor is None else donor.folder
            check_side_files(folder)
            if folder is None or not (folder / "config.json").is_file():
                check_side_files(index.folder)
        statistics = _of_adapters(statistics, experts, told)
        start = _initial_path(recipe, document, faults)
        initial = None
        if start is not None:
            with told("init", "init", "parameters", "init"):
                initial = open_expert(start, index, base)
                stack.callback(initial.close)
        if faults:
            raise RecipeError(faults, document.name)
        files = {n: s.statistics for n, s in recipe.experts.items() if s.statistics is not None}
        where = InputPaths(place, paths, files, start, adapters, bases)
        configs: dict[str, Mapping[str, Any]] = {}
        if recipe.script is not None and recipe.script.bands:
            models = _models(base, index, experts, bases, stack)
            rows = rows_of(recipe.script, models)
            if isinstance(rows, list):
                raise RecipeError(rows, document.name)
            base, experts = _restacked(rows, models, experts)
            configs = {name: model.config for name, model in models.items()}
            where = replace(where, rows=rows)
        return Inputs(
            base,
            index,
            experts,
            statistics,
            initial,
            paths=where,
            notes=tuple(notes),
            rows=where.rows,
            configs=configs,
            _stack=stack.pop_all(),
        )


def reopen(paths: InputPaths) -> Inputs:
    """Open inputs that were opened before, in this process or another."""
    paths = paths.here()
    with ExitStack() as stack:
        opened = open_adapted(paths.base, paths.adapters.get("base"))
        stack.callback(opened.close)
        plain = {} if paths.rows or paths.adapters else paths.experts
        base, index = common_base(opened, plain)
        experts = {
            name: _opened(path, paths.adapters.get(name), index, base)
            for name, path in paths.experts.items()
        }
        initial = None if paths.initial is None else open_expert(paths.initial, index, base)
        for expert in (*experts.values(), *([] if initial is None else [initial])):
            stack.callback(expert.close)
        if paths.rows:
            models = _models(base, index, experts, paths.bases, stack)
            base, experts = _restacked(paths.rows, models, experts)
        as_merged = _as_merged(experts)
        statistics = {
            name: as_merged(_load_statistics(path), name) for name, path in paths.statistics.items()
        }
        return Inputs(
            base,
            index,
            experts,
            statistics,
            initial,
            paths=paths,
            rows=paths.rows,
            _stack=stack.pop_all(),
        )


def _of_adapters(
    statistics: Mapping[str, Statistics],
    experts: Mapping[str, Expert],
    told: Callable[..., AbstractContextManager[None]],
) -> dict[str, Statistics]:
    """Return the statistics as a merge of these experts reads them, where they can be."""
    found = dict(statistics)
    if not found:  # what reads them is not imported for nothing
        return found
    as_merged = _as_merged(experts)
    for name, own in statistics.items():
        with told("statistics", f"statistics of '{name}'", "experts", name):
            found[name] = as_merged(own, name)
    return found


def _opened(path: Path, adapter: Path | None, index: CheckpointIndex, base: TensorSource) -> Expert:
    """Return an expert under the base's names, with an adapter merged into it if there is one."""
    if adapter is None:
        return open_expert(path, index, base)
    reader = open_adapted(path, adapter)
    own = reader.index
    return full_expert(reader, index.entries, str(path), own.config, own.folder, index.config)


def _models(
    base: TensorSource,
    index: CheckpointIndex,
    experts: Mapping[str, Expert],
    bases: Mapping[str, Path],
    stack: ExitStack,
) -> dict[str, Expert]:
    """Return every model that layers may come from, by name."""
    models = {"base": as_expert(base, "the base", index.config), **experts}
    for name, path in bases.items():
        models[name] = open_expert(path, index, base)
        stack.callback(models[name].close)
    return models


def _restacked(
    rows: Rows, models: Mapping[str, Expert], experts: Mapping[str, Expert]
) -> tuple[TensorSource, dict[str, Expert]]:
    base, own = restack(rows, models)
    return base, {name: own[name] for name in experts if name in own}


def _load_statistics(path: str) -> Statistics:
    from eutectic.statistics import load_statistics

    return load_statistics(path)


def _as_merged(experts: Mapping[str, Expert]) -> Callable[[Statistics, str], Statistics]:
    """Return what shows an owner's statistics as a merge of these experts reads them."""
    from eutectic.statistics.core_view import AdapterRows, as_merged

    rows = AdapterRows(experts)
    return lambda statistics, owner: as_merged(statistics, rows, owner)


def in_memory_inputs(
    base: Mapping[str, Tensor],
    experts: Mapping[str, Mapping[str, Tensor]],
    statistics: Mapping[str, Statistics | Mapping[str, LayerStatistics]],
    config: Mapping[str, Any] | None = None,
) -> Inputs:
    """Wrap state dicts in the surface that files have."""
    # As `config.json` would say it: `model.config.to_dict()` has numbers as keys (`id2label`).
    stated: dict[str, Any] = json.loads(json.dumps(dict(config or {}), default=str))
    reader = logical_tensors(StateDictReader(base, "the base"), stated)
    opened: dict[str, Expert] = {}
    for name, tensors in experts.items():
        label = f"expert '{name}'"
        source = logical_tensors(StateDictReader(tensors, label))
        opened[name] = full_expert(source, reader.entries, label, base_config=stated)
    wrapped = {name: as_statistics(given) for name, given in statistics.items()}
    return Inputs(reader, None, opened, wrapped, stated=stated)


def _initial_path(recipe: Recipe, document: Document, faults: list[Fault]) -> Path | None:
    """Return `parameters.init` where it names a checkpoint instead of a method."""
    init = recipe.parameters.get("init")
    if not isinstance(init, str) or init == ZERO or init in all_methods():
        return None
    if is_url(init) or Path(init).exists():
        try:
            return locate(init).path
        except CheckpointError as error:
            line = document.line("parameters", "init")
            faults.append(Fault("unusable_init", str(error), "init", line))
            return None
    what = f"init '{init}' is no method, not '{ZERO}', and no checkpoint either."
    line, nearest = document.line("parameters", "init"), suggest(init, list(all_methods()))
    faults.append(Fault("unknown_init", what, line=line, next=nearest))
    return None
