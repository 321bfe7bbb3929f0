"""α from norms alone: the merged change as large as the experts' own are on average."""

import math

from eutectic.errors import Note, NumericalError
from eutectic.execution.merging import factors_of, squares_with_factors
from eutectic.execution.schedule import Choice, Choose, Unscaled
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.tuning.search import Measured, ScaleCurve, rounded


def prepare_norm(plan: Plan, inputs: Inputs) -> Choose:
    """Return the choice of α from norms, which needs neither data nor statistics."""
    return _by_norms


def norm_scale(merged: float, experts: dict[str, float]) -> float:
    """Return α = mean_t ‖Δ_t‖ / ‖Δ_M‖, over the tensors whose α is open.

    No merge is better for being larger than its experts, and what a method adds up or makes flat
    may be several times as large. At T = 1 with Δ_M = Δ₁, α = 1. Experts that change nothing do not
    count. Ours; there is no source.

    Args:
        merged: ‖Δ_M‖², before α.
        experts: name -> ‖Δ_t‖².

    Raises:
        NumericalError: nothing is merged, or no expert changes anything.
    """
    changing = [math.sqrt(square) for square in experts.values() if square > 0]
    if not (merged > 0 and changing and math.isfinite(merged)):
        raise NumericalError(
            "no norm tells a scale: the merged change is zero, or no expert changes anything.\n"
            "Name a scale, or look at the experts with eutectic check."
        )
    return sum(changing) / len(changing) / math.sqrt(merged)


def _by_norms(unscaled: Unscaled) -> Choice:
    """Return α, and the ratio of norms at it, which is 1."""
    total, tensors = 0.0, 0
    experts: dict[str, float] = {}
    finished = unscaled.journal.finished
    for planned in unscaled.plan.merged:
        if not planned.tunable:
            continue
        found = finished["delta", planned.name].squares
        factors = factors_of(planned, unscaled.factors)
        for merged, _, *own in squares_with_factors(found, planned, factors).values():
            total += merged
            for source, square in zip(planned.experts, own, strict=True):
                experts[source.owner] = experts.get(source.owner, 0.0) + square
        tensors += bool(found)
    scale = rounded(norm_scale(total, experts))
    curve = ScaleCurve({scale: Measured(1.0)}, scale, False)
    numbers = {"scale": scale, "tensors": tensors, "default": unscaled.plan.scale}
    return Choice(scale, Note("norm_scale", numbers=numbers), curve.described("norm"))
