"""A linear system and its solution: where it starts, by conjugate gradients or Cholesky."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from eutectic.errors import MethodError, suggest
from eutectic.linalg.cg import (
    ROUNDING_ERRORS,
    CGResult,
    LinearMap,
    Trust,
    conjugate_gradients,
    conjugate_gradients_by_eigenbasis,
    eigenbasis_pays,
    jacobi,
    kronecker,
    of_rows,
)
from eutectic.linalg.gram import RidgedCholesky, ridged_cholesky
from eutectic.linalg.rows_and_diagonal import RidgedInverse, ridged_inverse
from eutectic.methods.grams import lack
from eutectic.methods.linear import mean_of_deltas
from eutectic.methods.matrices import missing_needs, run_method
from eutectic.methods.operators import NEEDS, Operator, System, damped, scaled, shifted
from eutectic.methods.registry import Context, all_methods, get_method
from eutectic.types import Merged

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


Unknown = Literal["delta", "weight"]
Preconditioner = Literal["none", "jacobi", "kronecker"]


def iterate(
    system: System,
    start: Tensor,
    offset: Tensor | None,
    *,
    steps: int,
    tolerance: float,
    preconditioner: Preconditioner,
    damping: float,
    radius: float | None,
) -> CGResult:
    """Run conjugate gradients on the unknown offset + delta; system, start and result are deltas.

    `offset` is W₀ when the weights are the unknown; `radius` is the largest norm of the delta; for
    the others see `MatsParameters`.
    """
    initial = start.to(system.right_side).reshape(system.right_side.shape)
    if offset is not None:
        system, initial = shifted(system, offset), initial + offset
    system = damped(system, damping)
    b = system.right_side
    matrix = system.matrix if preconditioner == "none" else None
    if radius is None and matrix is not None and eigenbasis_pays(len(b), b.shape[-1], steps):
        result = conjugate_gradients_by_eigenbasis(
            matrix, b, initial=initial, iterations=steps, tolerance=tolerance
        )
    else:
        # Products of Fisher-sized numbers leave the range of float32.
        system = scaled(system, 1 / float(system.diagonal.abs().max()))
        result = conjugate_gradients(
            system.apply,
            system.right_side,
            initial=initial,
            iterations=steps,
            tolerance=tolerance,
            preconditioner=_approximate_inverse(system, preconditioner),
            trust=None if radius is None else Trust(radius, offset),
        )
    return result if offset is None else replace(result, solution=result.solution - offset)


def _approximate_inverse(system: System, preconditioner: Preconditioner) -> LinearMap | None:
    if preconditioner == "none":
        return None
    if preconditioner == "kronecker" and system.thin is not None:
        eps = max(system.unit_roundoff, torch.finfo(system.right_side.dtype).eps)
        rest, rows = system.thin.remainder, system.thin.factor
        if rows is not None and (rest is None or not bool(rest.any())):
            return of_rows(rows, system.right_side.dtype, eps)
        inverse = _thin_inverse(system, ROUNDING_ERRORS * eps).inverse
        return lambda r: inverse.times(r).to(r)
    if preconditioner == "kronecker" and system.right is not None:
        dtype = system.right_side.dtype
        return kronecker(system.left, system.right, dtype, system.unit_roundoff)
    return jacobi(system.diagonal)


def continued(first: CGResult, second: CGResult) -> CGResult:
    """Join the records of two runs, the second from where the first stopped."""
    return replace(
        second,
        iterations=first.iterations + second.iterations,
        applications=first.applications + second.applications,
        residuals=first.residuals + second.residuals[1:],
    )


def closed_form(
    system: System, offset: Tensor | None, ridge: float
) -> tuple[Tensor, dict[str, Any]]:
    """Solve a float64 system whose operator is a right multiplication, or its diagonal.

    Returns the delta, and the ridge that it took for the record.
    """
    right_side = (system if offset is None else shifted(system, offset)).right_side
    record: dict[str, Any]
    if system.right is None and system.thin is None:
        solution = right_side / (system.diagonal + ridge * system.diagonal.mean())
        record = {"ridge": ridge}
    else:
        solved, solve = _solver(system, ridge)
        solution = solve(right_side)
        if solved.escalated:
            # A(A + ρ)⁻¹ leaves what the Gram determines and removes what its rounding put into
            # the null space, which the first solve amplifies by 1/ρ.
            solution = solve(system.apply(solution))
        record = {
            "ridge": solved.ridge,
            "ridge_escalated": solved.escalated,
            "dead_inputs": solved.dead,
        }
    return (solution if offset is None else solution - offset), record


def _solver(system: System, ridge: float) -> tuple[RidgedCholesky | RidgedInverse, LinearMap]:
    """Return B -> B·A⁻¹ of a right multiplication, and what it took."""
    if system.right is None:
        thin = _thin_inverse(system, ridge)
        return thin, thin.inverse.times
    solved = ridged_cholesky(system.right, ridge=ridge, unit_roundoff=system.unit_roundoff)
    return solved, lambda b: torch.cholesky_solve(b.mT, solved.factor).mT


def _thin_inverse(system: System, ridge: float) -> RidgedInverse:
    """Return the inverse of A in rows and a diagonal, of which no matrix is formed."""
    thin = system.thin
    assert thin is not None and thin.factor is not None
    rows = thin.factor.double() * thin.scale**0.5
    rest = rows.new_zeros(rows.shape[1]) if thin.remainder is None else thin.remainder.double()
    return ridged_inverse(rows, rest, ridge=ridge, unit_roundoff=system.unit_roundoff)


def offset_of(space: Unknown, like: Tensor, context: Context) -> Tensor | None:
    """Return what lies between the unknown and the delta: W₀ for weights, None for deltas."""
    if space == "delta":
        return None
    if context.base is None:
        raise MethodError("space 'weight' solves for the weights and needs base.")
    return context.base.to(like).reshape(like.shape)


def reason_to_rest(
    operator: Operator, deltas: Tensor, context: Context, normalize_counts: bool
) -> str | None:
    """Say why this tensor has to take another rule, or return None."""
    if operator in ("gram", "kfac", "task_gram") and deltas.ndim != 3:
        return f"operator '{operator}' is for matrices, this tensor is none"
    return lack(NEEDS[operator], context, normalize_counts)


def averaged(deltas: Tensor, context: Context, reason: str) -> Merged:
    """Return the experts' mean, with the reason why in the record."""
    return Merged(mean_of_deltas(deltas, context), {"rest": "average", "reason": reason})
