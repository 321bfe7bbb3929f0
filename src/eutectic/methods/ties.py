"""TIES: trim, elect sign, disjoint merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from eutectic.linalg.select import magnitude_thresholds
from eutectic.methods.registry import Chunks, Context, Parameters, register

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
    thresholds = magnitude_thresholds(chunks, parameters.density)
    total = 0.0
    for chunk in chunks():
        total += signed_votes(context.weigh(trim(chunk, thresholds)))
    return TiesState(thresholds, float((total > 0) - (total < 0)))


@register(
    "ties",
    family="ties",
    summary="Trim small entries, elect a sign per entry, merge the entries that agree with it.",
    paper="TIES-Merging: resolving interference when merging models, arXiv 2306.01708",
    parameters=TiesParameters,
    elementwise=True,
    prepare=_prepare,
    model_scope=lambda p: p.scope == "model",
    laws={"permutation", "homogeneous", "zero"},
)
def ties(deltas: Tensor, parameters: TiesParameters, context: Context) -> Tensor:
    """Return the weighted disjoint mean (or sum) of the trimmed deltas that agree in sign.

    Keep Δ_t where |Δ_t| is at least the int(density·n)-th largest magnitude of expert t; elect
    γ = sign(Σ w_t Δ_t); where that sum is exactly 0, γ is the majority sign over the scope;
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
    limits = thresholds.to(deltas).view(-1, *[1] * (deltas.ndim - 1))
    return torch.where(deltas.abs() >= limits, deltas, 0)


def signed_votes(weighted: Tensor) -> float:
    """Return the sum over entries of sign(Σ_t x_t), the vote for the majority sign."""
    return float(weighted.sum(0).sign().sum(dtype=torch.float64))


def disjoint_merge(kept: Tensor, context: Context, majority: float, aggregate: Aggregate) -> Tensor:
    """Return the weighted mean or sum, per entry, of the inputs that agree with the elected sign."""
    weighted = context.weigh(kept)
    elected = weighted.sum(0).sign()
    if majority:
        elected = torch.where(elected == 0, majority, elected)
    agree = kept.sign() == elected.unsqueeze(0)
    agree &= kept != 0
    total = torch.where(agree, weighted, 0).sum(0)
    if aggregate == "sum":
        return total
    share = context.weigh(agree.to(kept.dtype)).sum(0)
    return torch.where(share != 0, total / torch.where(share != 0, share, 1), 0)
