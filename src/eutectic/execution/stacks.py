"""What a method is given of one tensor: the stacked values of its experts, and the context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eutectic.errors import NumericalError
from eutectic.methods import Context
from eutectic.methods.linear import finite
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.planning.tensors import TensorPlan
from eutectic.planning.values import read_delta, read_weight


def read_stack(
    planned: TensorPlan,
    plan: Plan,
    inputs: Inputs,
    start: int,
    stop: int,
    base: Tensor | None,
    *,
    weights: bool = False,
) -> Tensor:
    """Read one flat range of every expert as `[T, n]` deltas, or as weights.

    `base` is that range of the base; weights do without where every expert has them all.

    Raises:
        NumericalError: NaN or Inf, unless the recipe allows it.
    """
    stack = torch.empty(len(planned.experts), stop - start, dtype=planned.compute)
    for row, name in enumerate(planned.experts):
        if weights:
            stack[row] = read_weight(inputs.experts[name], planned, start, stop, base)
        else:
            assert base is not None
            stack[row] = read_delta(inputs.experts[name], planned, start, stop, base)
    if plan.recipe.nonfinite == "error":
        _check_finite(stack, planned, base)
    return stack


def _check_finite(stack: Tensor, planned: TensorPlan, base: Tensor | None) -> None:
    if finite(stack) and (base is None or finite(base)):
        return
    if base is not None and not finite(base):
        culprit = "the base"
    else:
        bad = [n for n, row in zip(planned.experts, stack, strict=True) if not finite(row)]
        culprit = "expert " + ", ".join(f"'{n}'" for n in bad)
    raise NumericalError(
        f"{planned.name}: NaN or Inf in {culprit}.\n"
        "Repair the checkpoint, leave the expert out, or set nonfinite: allow."
    )


def context_for(planned: TensorPlan, plan: Plan, state: Any = None) -> Context:
    """Return the context of one tensor without what only matrices need."""
    return Context(
        weights=tuple(plan.recipe.experts[name].weight for name in planned.experts),
        experts=planned.experts,
        tensor=planned.seed_name,
        seed=plan.recipe.seed,
        precision=plan.recipe.precision,
        state=state,
    )
