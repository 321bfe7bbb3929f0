"""From a recipe's `scale: {search: …}` to a number, once the deltas are known."""

from __future__ import annotations

from eutectic.errors import Note, RequestError
from eutectic.execution.schedule import Choice, Choose, Unscaled
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.tuning.output_error import (
    ClosedForm,
    closed_form_scale,
    measured_layers,
    usable_layers,
)
from eutectic.tuning.search import Measured, ScaleCurve, grid, rounded


def choose_scale(plan: Plan, inputs: Inputs) -> Choose:
    """Return how α is chosen for a plan whose recipe asks for a search.

    What is missing is found before any work: tasks, their data, statistics.

    Raises:
        RequestError: no tensor's α is open, or the search lacks what it needs.
    """
    search = plan.search
    if search is None:
        raise RequestError(f"the recipe's scale is {plan.scale}: there is nothing to search.")
    if not any(t.tunable for t in plan.tensors):
        raise RequestError(
            "no tensor takes the recipe's scale: rules or scale_tensors fix every one of them.\n"
            "Leave the search out, or the rules' scales."
        )
    if search.search == "gram":
        _check_statistics(plan, inputs)
        return _by_grams
    from eutectic.tuning.objectives import prepare_objective

    return prepare_objective(search, plan, inputs)


def _check_statistics(plan: Plan, inputs: Inputs) -> None:
    lacking = [name for name in inputs.experts if name not in inputs.statistics]
    if lacking:
        raise RequestError(
            f"scale: auto needs statistics of every expert, and {', '.join(lacking)} "
            f"{'has' if len(lacking) == 1 else 'have'} none.\n"
            "Collect them (eutectic collect) and name them in the recipe, or search with data:\n"
            "scale: {search: divergence, tasks: tasks.yaml}, or search: validation with labels."
        )
    if not usable_layers(plan, inputs):
        raise RequestError(
            "scale: auto needs Grams of matrices, and the statistics have none of a matrix whose "
            "scale is open.\nCollect Grams (eutectic collect), or search with data."
        )


def _by_grams(unscaled: Unscaled) -> Choice:
    progress = unscaled.limits.progress

    def tell(done: int, total: int, name: str) -> None:
        if progress is not None:
            progress(done, total, name)

    form = closed_form_scale(measured_layers(unscaled, tell))
    curve = parabola(form)
    plan, inputs = unscaled.plan, unscaled.inputs
    open_matrices = sum(t.tunable and t.treatment.value == "matrix" for t in plan.tensors)
    record = {
        **curve.described("gram"),
        "layers": form.layers,
        "statistics": {
            name: statistics.provenance.get("data")
            for name, statistics in inputs.statistics.items()
            if statistics.provenance
        },
    }
    numbers = {
        "scale": curve.scale,
        "layers": form.layers,
        "matrices": open_matrices,
        "lost_percent": 100 * form.error(curve.scale),
    }
    return Choice(curve.scale, Note("closed_form_scale", numbers=numbers), record)


def parabola(form: ClosedForm) -> ScaleCurve:
    """Return the closed form's error at the usual grid and at its minimum."""
    best = rounded(form.scale)
    scales = sorted({*grid(0.02, 3.0, 11), best})
    return ScaleCurve({s: Measured(form.error(s)) for s in scales}, best, False)
