"""TIES: trim, elect sign, disjoint merge."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from eutectic.linalg.select import magnitude_thresholds
from eutectic.methods.registry import Chunks, Context, Parameters, Rules, Takes, register

Aggregate = Literal["mean", "sum"]


@dataclass(frozen=True, kw_only=True)
class TiesParameters(Parameters):
    """Parameters of `ties`.

    Attributes:
        density: fraction of entries kept per expert.
        scope: rank magnitudes within each tensor, or over the whole task vector as the paper does.
        aggregate: mean or sum of the entries that agree with the elected sign.
    """

    density: Annotated[float, Ge(0), Le(1)] = 0.2
    scope: Literal["tensor", "model"] = "tensor"
    aggregate: Aggregate = "mean"


@dataclass(frozen=True)
class TiesState:
    """Magnitude thresholds `[T]` and the majority sign (−1, 0 or 1) over the scope."""

    thresholds: Tensor
    majority: float


def _prepare(chunks: Chunks, parameters: TiesParameters, context: Context) -> TiesState:
    thresholds = magnitude_thresholds(chunks, context.each(parameters, "density"))
    total = 0.0
    for chunk in chunks():
        total += signed_votes(trim(chunk, thresholds), context)
    return TiesState(thresholds, float((total > 0) - (total < 0)))


@register(
    "ties",
    summary="Trim small entries, elect a sign per entry, merge the entries that agree with it.",
    paper="TIES-Merging: resolving interference when merging models, arXiv 2306.01708",
    parameters=TiesParameters,
    laws={"permutation", "homogeneous", "zero", "absent"},
    takes=Takes(elementwise=True, per_expert={"density"}),
    rules=Rules(prepare=_prepare, model_scope=lambda p: p.scope == "model"),
)
def ties(deltas: Tensor, parameters: TiesParameters, context: Context) -> Tensor:
    """Return the weighted disjoint mean (or sum) of the trimmed deltas that agree in sign.

    Keep Δ_t where |Δ_t| is at least the int(density·n)-th largest magnitude of expert t (none of a
    tensor of fewer than 1/density entries, such as a scalar; `scope: model` has no such tensors);
    elect γ = sign(Σ w_t Δ_t); where that sum is exactly 0, γ is the majority sign over the scope;
    return Σ w_t Δ_t [sign Δ_t = γ] / Σ w_t [sign Δ_t = γ] (`mean`) or its numerator (`sum`).

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: three reading passes (two for the exact selection by
    16-bit digits, one for the majority sign) and the merge. At T = 1 the trimmed delta; zero
    deltas give zero; entries that nobody keeps are zero.

    Deviations from the source: the official code keeps one entry more than density·n (an
    off-by-one in its k-th value); all entries equal to the threshold are kept.
    """
    state: TiesState = context.state
    kept = trim(deltas, state.thresholds)
    return disjoint_merge(kept, context, state.majority, parameters.aggregate)


def trim(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """Return the deltas with entries below their expert's threshold set to zero."""
    kept = torch.empty_like(deltas)
    for row, delta, threshold in zip(kept, deltas, thresholds.to(deltas), strict=True):
        if threshold == 0:
            row.copy_(delta)
        else:  # hardshrink keeps what is strictly larger, in one pass
            below = torch.nextafter(threshold, torch.zeros_like(threshold))
            torch.hardshrink(delta, float(below), out=row)
    return kept


def signed_votes(kept: Tensor, context: Context) -> float:
    """Return the sum over entries of sign(Σ w_t x_t), the vote for the majority sign."""
    return float(_total(kept, context).sign_().sum(dtype=torch.float64))


def disjoint_merge(kept: Tensor, context: Context, majority: float, aggregate: Aggregate) -> Tensor:
    """Return the weighted mean or sum, per entry, of inputs that agree with the elected sign."""
    elected = _total(kept, context).sign_()
    if majority:
        elected = torch.where(elected == 0, majority, elected)
    # What agrees with the elected sign is positive after multiplication with it, exactly.
    agreeing = (kept * elected).clamp_min_(0)
    total = _total(agreeing, context).mul_(elected)
    if aggregate == "sum":
        return total
    share = _total(agreeing.sign_(), context)
    return total.div_(torch.where(share == 0, 1, share))


def _total(inputs: Tensor, context: Context) -> Tensor:
    """Return Σ w_t x_t.

    In the experts' order, so that the length of a chunk cannot change it; and with each product
    rounded before the sum (no fused multiply-add), so that opposite ones cancel to zero exactly.
    """
    weighted = context.weigh(inputs)
    total = weighted[0].clone()
    for x in weighted[1:]:
        total.add_(x)
    return total
