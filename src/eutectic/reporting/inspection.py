"""The public entry: read a base, its experts and merged models, and say how they relate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from eutectic.checkpoint.experts import Expert, open_expert
from eutectic.checkpoint.hub import resolve
from eutectic.checkpoint.writer import check_replaced, write_atomically
from eutectic.errors import EutecticError, Note, RequestError
from eutectic.options import options_from
from eutectic.planning.inputs import Inputs, open_inputs
from eutectic.planning.plan import Plan, make_plan
from eutectic.recipes.load import Source, check_recipe, load_recipe
from eutectic.recipes.schema import Recipe
from eutectic.reporting.alignment import check_error
from eutectic.reporting.matrices import selected_layers, stream_matrices, work_of
from eutectic.reporting.measure import measure_layer
from eutectic.reporting.plots import check_plots, draw
from eutectic.reporting.results import KnownNai, read_nai
from eutectic.reporting.schema import Inspection, Layer
from eutectic.reporting.summary import summarise

if TYPE_CHECKING:
    from typing_extensions import Unpack

Progress = Callable[[float, float, str], None]
_KEPT = ("base", "experts", "tensors", "statistics_of")  # of a recipe; the rest is about merging


class InspectionOptions(TypedDict, total=False):
    """What is measured, and who is told.

    Attributes:
        layers: shell pattern over tensor names; other matrices are left out.
        rank: k, leading singular triplets that overlaps compare; None: int(r/T).
        error: relative error of Δ_M that defines q in SAR, see `subspace_alignment_ratio` (0.05).
        progress: called with (done, total, tensor).
    """

    layers: str | None
    rank: int | None
    error: float
    progress: Progress | None


@dataclass(frozen=True)
class _Options:
    layers: str | None = None
    rank: int | None = None
    error: float = 0.05
    progress: Progress | None = None


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
        **options: `layers`, `rank`, `error`, `progress`; see `InspectionOptions`.

    Returns:
        The inspection; `.summary` for the whole model, `.layers` per matrix.

    Undefined values are None: cosines, overlaps and SAR of a zero delta; means leave them out.

    Raises:
        RequestError: the request is wrong, or a merged model is not of this base.
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
    if asked.rank is not None and asked.rank < 1:
        raise RequestError(f"the rank of subspaces must be at least 1, got {asked.rank}.")
    if results is not None and not merged:
        raise RequestError("results without merged models: name the models that they are of.")
    target = _checked_output(output)
    if plots is not None:
        check_plots(Path(plots))
    checked, source = _recipe(recipe, base, experts)
    paths = {name: str(path) for name, path in (merged or {}).items()}
    known = None if results is None else read_nai(Path(results), list(paths))
    with ExitStack() as stack:
        inputs = stack.enter_context(open_inputs(checked, source))
        models = _open_merged(paths, inputs, stack)
        plan = make_plan(checked, inputs, source)
        measured = _measure(plan, inputs, models, asked)
        notes = _notes(plan, inputs, measured, known)
    found = Inspection(
        eutectic=version("eutectic"),
        base=checked.base,
        experts={name: spec.path for name, spec in checked.experts.items()},
        merged=paths,
        error=asked.error,
        pattern=asked.layers,
        notes=notes,
        summary=summarise(measured, None if known is None else known.values),
        layers=measured,
    )
    if target is not None:
        write_atomically(target, (found.model_dump_json(indent=1) + "\n").encode())
    if plots is not None:
        draw(found, Path(plots))
    return found


def _measure(
    plan: Plan, inputs: Inputs, models: Mapping[str, Expert], asked: _Options
) -> list[Layer]:
    chosen = selected_layers(plan, models, asked.layers)
    work = work_of(chosen)
    done = 0.0
    measured: list[Layer] = []
    for planned, cost in zip(chosen, work, strict=True):
        if asked.progress is not None:
            asked.progress(done, sum(work), planned.name)
        for matrices in stream_matrices(planned, inputs, models):
            measured.append(measure_layer(matrices, asked.error, asked.rank))
        done += cost
    if asked.progress is not None:
        asked.progress(done, sum(work), "")
    return measured


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
    given = {"base": None if base is None else str(base), "experts": experts}
    own.update({key: value for key, value in given.items() if value is not None})
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
    path = Path(output)
    if path.is_dir() or not path.parent.is_dir():
        raise RequestError(
            f"{path}: the inspection is written to a file in a folder that exists, such as "
            "inspection.json."
        )
    check_replaced(path, {"schema_version", "layers"}, "the inspection")
    return path


def _notes(
    plan: Plan, inputs: Inputs, layers: Sequence[Layer], known: KnownNai | None
) -> list[str]:
    other = len(plan.tensors) - len({layer.name.partition("[")[0] for layer in layers})
    count = len(layers)
    notes = [Note("inspected", numbers={"matrices": count, "others": other})]
    for name in inputs.experts:
        zero = sum(layer.experts[name].norm == 0 for layer in layers)
        if zero:
            notes.append(Note("unchanged", (name,), {"unchanged": zero, "matrices": count}))
    without = tuple(n for n in inputs.experts if n not in inputs.statistics)
    if inputs.statistics and without:
        notes.append(Note("no_activation_interference", without))
    if known is not None:
        notes.append(Note("nai_split", (known.split,)))
    return [str(note) for note in notes]
