"""Where an iterative method starts: another method's result, a checkpoint, or zero."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eutectic.errors import MethodError, suggest
from eutectic.methods.linear import mean_of_deltas
from eutectic.methods.matrices import missing_needs, run_method
from eutectic.methods.registry import Context, all_methods, get_method

ZERO = "zero"
PUBLISHED_SCALES = {"task_arithmetic": 0.3}


def initial_guess(
    deltas: Tensor, init: str, scale: float | None, context: Context
) -> tuple[Tensor, dict[str, Any]]:
    """Return the delta to start from, and what the record says about it.

    `context.initial` is taken when it is there (times `scale`, default 1). Otherwise `init` names
    a registered method, run with its default parameters on the same deltas, times `scale`
    (default: 0.3 for task arithmetic, the method's own default scale for the others); tensors it
    has no rule for take the mean, tensors it lacks statistics for its fallback.

    Raises:
        MethodError: `init` names no method and no initial delta was passed, or it names a method
            that iterates from an initial guess itself.
    """
    if context.initial is not None:
        factor = 1.0 if scale is None else scale
        return context.initial.to(deltas) * factor, {"from": "given", "scale": factor}
    if init == ZERO:
        return torch.zeros_like(deltas[0]), {"from": ZERO}
    if init not in all_methods():
        names = [*all_methods(), ZERO]
        raise MethodError(
            f"init '{init}' is no method.{suggest(init, names)}\n"
            "A checkpoint to start from is passed as `initial`, the merged delta itself."
        )
    entry = get_method(init)
    values = entry.parse({})
    if hasattr(values, "init"):
        raise MethodError(f"init '{init}' needs an initial guess itself; name another method.")
    nested = replace(context, state=None)
    if missing_needs(entry, values, nested) and entry.fallback(values) != init:
        entry = get_method(entry.fallback(values))
        values = entry.parse({})
    entry.check_expert_count(len(deltas))
    if deltas.ndim != 3 and not entry.vectors:
        return mean_of_deltas(deltas, context), {"from": "average", "scale": 1.0}
    factor = scale
    if factor is None:
        factor = PUBLISHED_SCALES.get(entry.name, entry.default_scale(len(deltas)))
    delta = run_method(entry, deltas, values, nested).delta
    return delta * factor, {"from": entry.name, "scale": factor}
