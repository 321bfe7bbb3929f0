"""The public entry: read a base, its experts and merged models, and say how they relate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, ValidationError

from eutectic.checkpoint.experts import Expert, open_expert
from eutectic.checkpoint.locating import resolve
from eutectic.checkpoint.writer import check_replaced, write_atomically
from eutectic.conventions_order import in_model_order
from eutectic.errors import EutecticError, Note, RequestError, suggest
from eutectic.execution.executors import limits_of
from eutectic.execution.norms import explosion, summary_of
from eutectic.notebook import with_bar
from eutectic.options import options_from
from eutectic.planning.inputs import Inputs, open_inputs
from eutectic.planning.plan import Plan, make_plan
from eutectic.recipes.load import Source, check_recipe, load_recipe
from eutectic.recipes.schema import Recipe
from eutectic.reporting.layers import measure_layer, selected_layers, stream_matrices
from eutectic.reporting.matrix_measures import check_error
from eutectic.reporting.memory import check_inspection_memory
from eutectic.reporting.plots import check_plots, draw
from eutectic.reporting.schema import Inspection, Layer
from eutectic.reporting.summary import growth, summarise
from eutectic.storage import local_path, url_of, view_once
from eutectic.storage.small_files import INDEX_BYTES, read_bytes
from eutectic.versions import version
from eutectic.words import public_path

if TYPE_CHECKING:
    from typing_extensions import Unpack

Progress = Callable[[float, float, str], None]
_KEPT = (
    "base",
    "experts",
    "tensors",
    "unmatched",
    "statistics_of",
)  # of a recipe; the rest is about merging


class InspectionOptions(TypedDict, total=False):
    """What is measured, and who is told; see `inspect`."""

    layers: str | None
    rank: int | None
    error: float
    memory: str | int | None
    progress: Progress | None


@dataclass(frozen=True)
class _Options:
    layers: str | None = None
    rank: int | None = None
    error: float = 0.05
    memory: str | int | None = None
    progress: Progress | None = None


@with_bar("inspecting")
def inspect(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    base: str | Path | None = None,
    experts: Mapping[str, Any] | None = None,
    merged: Mapping[str, str | Path] | None = None,
    results: str | Path | None = None,
    output: str | Path | None = None,
    plots: str | Path | None = None,
    **options: Unpack[InspectionOptions],
) -> Inspection:
    """Measure norms, spectra, interference and, of merged models, subspace alignment.

    Every tensor that a merge treats as a matrix is read once, one tensor at a time, as the linear
    map [out, in] that methods see: stacks and fused matrices of the recipe's rules part by part.

    Args:
        recipe: a recipe, for its base, experts and rules about tensors; its method is not used.
        base: the base, on top of the recipe's.
        experts: name -> path, or name -> {path, statistics}, as for `eutectic.merge`.
        merged: name -> folder of a merged model, or adapter. Δ_M = W_M − W₀ holds the scale.
        results: `results.json` of `eutectic evaluate`; its checkpoints have the names of `merged`,
            its tasks those of the experts.
        output: file for the inspection as JSON, written at the end, whole or not at all.
        plots: folder for PNGs.
        **options: what is measured, and within which limits:

            - `layers`: shell pattern over tensor names; other matrices are left out.
            - `rank`: k, leading singular triplets that overlaps compare; None: int(r/T).
            - `error`: of Δ_M, which defines q in SAR, see `subspace_alignment_ratio` (0.05).
            - `memory`: limit in bytes or as text ("4GB"; 60 % of what is available); a tensor that
              needs more is refused before anything is read.
            - `progress`: called with (done, total, tensor).

    Returns:
        The inspection; `.summary` for the whole model, `.layers` per matrix.

    Undefined values are None: cosines, overlaps and SAR of a zero delta; means leave them out.

    Raises:
        RequestError: the request is wrong, a merged model is not of this base, or a tensor needs
            more memory than is allowed.
        MissingExtraError: plots without matplotlib.
        EutecticError: a file is damaged, holds NaN, or cannot be written.

    Memory: one tensor of every checkpoint, and its Grams. Cost: per matrix and checkpoint one
    float64 eigenproblem of the shorter side; adapters cost little.

    Example:
        >>> found = eutectic.inspect(
        ...     base="base/", experts={"a": "a/", "b": "b/"}, merged={"iso_c": "merged/"}
        ... )  # doctest: +SKIP
        >>> found.summary.merged["iso_c"].task_sar  # doctest: +SKIP
        {'a': 0.97, 'b': 0.95}
    """
    asked = options_from(_Options, options, "inspect")
    check_error(asked.error)
    memory = limits_of(None, asked.memory).memory
    if asked.rank is not None and asked.rank < 1:
        raise RequestError(f"the rank of subspaces must be at least 1, got {asked.rank}.")
    if results is not None and not merged:
        raise RequestError("results without merged models: name the models that they are of.")
    target = _checked_output(output)
    if plots is not None:
        check_plots(Path(plots))
    checked, source = _recipe(recipe, base, experts)
    paths = {name: str(path) for name, path in (merged or {}).items()}
    split, nai = (None, None) if results is None else _read_nai(view_once(results), list(paths))
    with ExitStack() as stack:
        inputs = stack.enter_context(open_inputs(checked, source))
        models = _open_merged(paths, inputs, stack)
        plan = make_plan(checked, inputs, source)
        measured = _measure(plan, inputs, models, asked, memory)
        notes = _notes(plan, inputs, measured, split)
    found = Inspection(
        eutectic=version("eutectic"),
        base=public_path(checked.base),
        experts={name: public_path(spec.path) for name, spec in checked.experts.items()},
        merged={name: public_path(path) for name, path in paths.items()},
        error=asked.error,
        pattern=asked.layers,
        notes=notes,
        summary=summarise(measured, nai),
        layers=measured,
    )
    if target is not None:
        write_atomically(target, (found.model_dump_json(indent=1) + "\n").encode())
    if plots is not None:
        draw(found, Path(plots))
    return found


def _measure(
    plan: Plan, inputs: Inputs, models: Mapping[str, Expert], asked: _Options, memory: int
) -> list[Layer]:
    chosen = selected_layers(plan, models, asked.layers)
    check_inspection_memory(chosen, inputs, models, asked.rank, memory)
    work = [float(t.elements * min(t.shape[-2:])) for t in chosen]  # × the shorter side
    advance = asked.progress or (lambda done, total, name: None)
    measured: list[Layer] = []
    for index, planned in enumerate(chosen):
        advance(sum(work[:index]), sum(work), planned.name)
        matrices = stream_matrices(planned, inputs, models)
        measured += [measure_layer(m, asked.error, asked.rank) for m in matrices]
    advance(sum(work), sum(work), "")
    named = {layer.name: layer for layer in measured}
    return [named[name] for name in in_model_order(named)]


def _recipe(
    recipe: str | Path | Mapping[str, Any] | None,
    base: str | Path | None,
    experts: Mapping[str, Any] | None,
) -> tuple[Recipe, Source]:
    """Return what to open as a recipe of the plainest method, which needs nothing."""
    source = Source()
    stated: dict[str, Any] = {}
    if isinstance(recipe, (str, Path)):
        loaded, source = load_recipe(recipe)
        stated = loaded.model_dump(mode="json", exclude_unset=True)
    elif recipe is not None:
        stated = dict(recipe)
    own = {key: stated[key] for key in _KEPT if key in stated}
    if base is not None:
        own["base"] = str(base)
    if experts is not None:
        own["experts"] = experts
    # An expert that lacks a tensor counts as unchanged there, so that all layers have all experts.
    return check_recipe({**own, "method": "average", "missing": "base"}), source


def _open_merged(paths: Mapping[str, str], inputs: Inputs, stack: ExitStack) -> dict[str, Expert]:
    assert inputs.index is not None
    models: dict[str, Expert] = {}
    for name, path in paths.items():
        try:
            models[name] = open_expert(resolve(path), inputs.index)
        except (EutecticError, OSError) as error:
            raise RequestError(f"merged model '{name}': {error}") from None
        stack.callback(models[name].close)
    return models


def _checked_output(output: str | Path | None) -> Path | None:
    if output is None:
        return None
    path = local_path(output)
    if path.is_dir() or (url_of(path) is None and not path.parent.is_dir()):
        raise RequestError(
            f"{path}: the inspection is written to a file in a folder that exists, such as "
            "inspection.json."
        )
    check_replaced(path, {"schema_version", "layers"}, "the inspection")
    return path


def _notes(plan: Plan, inputs: Inputs, layers: Sequence[Layer], split: str | None) -> list[str]:
    other = len(plan.tensors) - len({layer.name.partition("[")[0] for layer in layers})
    count = len(layers)
    notes = [Note("inspected", numbers={"matrices": count, "others": other})]
    for name in inputs.experts:
        if zero := sum(layer.experts[name].norm == 0 for layer in layers):
            notes.append(Note("unchanged", (name,), {"unchanged": zero, "matrices": count}))
    without = tuple(n for n in inputs.experts if n not in inputs.statistics)
    if inputs.statistics and without:
        notes.append(Note("no_activation_interference", without))
    for model in layers[0].merged:
        notes += explosion(summary_of(*growth(layers, model)), model)
    if split is not None:
        notes.append(Note("nai_split", (split,)))
    return [str(note) for note in notes]


class _View(BaseModel):
    """The part of results.json that is read here."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _Task(_View):
    name: str
    expert: str


class _Result(_View):
    checkpoint: str
    task: str
    nai: float | None


class _Results(_View):
    schema_version: Literal[1]
    split: str
    tasks: list[_Task]
    results: list[_Result]


def _read_nai(path: Path, merged: Sequence[str]) -> tuple[str, dict[str, dict[str, float | None]]]:
    """Return the split that was scored, and merged model -> expert -> mean NAI of its tasks."""
    try:
        results = _Results.model_validate_json(read_bytes(path, INDEX_BYTES))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise RequestError(
            f"{path}: holds no results ({where}: {first['msg']}).\n"
            "Name the results.json of `eutectic evaluate`."
        ) from None
    expert_of = {task.name: task.expert for task in results.tasks}
    found: dict[str, dict[str, list[float]]] = {}
    for result in results.results:
        if result.checkpoint in merged:
            expert = expert_of.get(result.task, result.task)
            own = found.setdefault(result.checkpoint, {}).setdefault(expert, [])
            own += [] if result.nai is None else [result.nai]
    if not found:
        listed = list(dict.fromkeys(result.checkpoint for result in results.results))
        raise RequestError(
            f"{path}: has results of {', '.join(listed) or 'nothing'}, of none of the merged "
            f"models {', '.join(merged)}.{suggest(merged[0], listed)}\n"
            "Give merged models the names that they have in the results."
        )
    values = {
        name: {n: sum(own) / len(own) if own else None for n, own in tasks.items()}
        for name, tasks in found.items()
    }
    return results.split, values
