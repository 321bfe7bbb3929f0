"""TIES: trim, elect sign, disjoint merge."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from eutectic.linalg.select import magnitude_thresholds
from eutectic.methods.registry import Chunks, Context, Parameters, Rules, Takes, register

Aggregate = Literal["mean", "sum"]
Consensus = Literal["paper", "weighted"]
Rescale = Literal["l1", False]

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, kw_only=True)
class TiesParameters(Parameters):
    """Parameters of `ties`.

    Attributes:
        density: fraction of entries kept per expert.
        scope: rank magnitudes within each tensor, or over the whole task vector as the paper does.
        aggregate: mean or sum of the entries that agree with the elected sign.
        consensus: which entries agree. "paper": those whose own sign is the elected one; where the
            votes cancel, the majority sign is elected. "weighted": those whose sign after the
            weight is; where the votes cancel, plus is elected, as mergekit does.
        rescale: "l1" gives each trimmed delta the sum of magnitudes that it had.
        keep_at_least: fewest entries kept per expert and tensor, unless `density` is 0.
    """

    density: Annotated[float, Ge(0), Le(1)] = 0.2
    scope: Literal["tensor", "model"] = "tensor"
    aggregate: Aggregate = "mean"
    consensus: Consensus = "paper"
    rescale: Rescale = False
    keep_at_least: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True)
class TiesState:
    """Magnitude thresholds `[T]`, the majority sign (−1, 0 or 1), and factors, over the scope."""

    thresholds: Tensor
    majority: float
    factors: tuple[float, ...] = ()


def _prepare(chunks: Chunks, parameters: TiesParameters, context: Context) -> TiesState:
    densities = context.each(parameters, "density")
    if all(density == 1 for density in densities):
        thresholds = torch.zeros(len(densities))
    else:
        thresholds = magnitude_thresholds(chunks, densities, parameters.keep_at_least)
    factors: tuple[float, ...] = ()
    if parameters.rescale:
        factors = l1_factors((chunk, trim(chunk, thresholds)) for chunk in chunks())
    total = 0.0
    for chunk in chunks() if parameters.consensus == "paper" else ():
        total += signed_votes(times(trim(chunk, thresholds), factors), context)
    return TiesState(thresholds, float((total > 0) - (total < 0)), factors)


def l1_factors(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, ...]:
    """Return Σ|x_t| / Σ|y_t| for each row of a stream of pairs `[T, n]`, 1 where y_t is zero."""
    before = after = torch.zeros(1, dtype=torch.float64)
    for whole, kept in pairs:
        before = before + whole.flatten(1).abs().sum(1, dtype=torch.float64).cpu()
        after = after + kept.flatten(1).abs().sum(1, dtype=torch.float64).cpu()
    return tuple(torch.where(after > 0, before / after.clamp_min(_TINY), 1.0).tolist())


def times(inputs: Tensor, factors: Sequence[float]) -> Tensor:
    """Return the rows times their factors; as they are where there is none."""
    if not factors:
        return inputs
    shape = (-1, *[1] * (inputs.ndim - 1))
    return inputs * torch.tensor(factors, dtype=inputs.dtype, device=inputs.device).view(shape)


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
    `consensus`, `rescale` and `keep_at_least` are the variants that mergekit has.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: three reading passes (two for the exact selection by
    16-bit digits, one for the majority sign) and the merge. At T = 1 the trimmed delta; zero
    deltas give zero; entries that nobody keeps are zero.

    Deviations from the source: the official code keeps one entry more than density·n (an
    off-by-one in its k-th value); all entries equal to the threshold are kept.
    """
    state: TiesState = context.state
    kept = times(trim(deltas, state.thresholds), state.factors)
    if parameters.consensus == "weighted":
        return weighted_consensus(kept, context, parameters.aggregate)
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


def weighted_consensus(kept: Tensor, context: Context, aggregate: Aggregate) -> Tensor:
    """Return the merge by the signs of w_t x_t, plus where they cancel, of `[T, …]` inputs.

    With s = 1 where Σ w_t x_t ≥ 0 and −1 elsewhere, those with sign(w_t x_t) = s take part:
    Σ w_t x_t over them, divided by their Σ w_t unless that is 0 (`mean`).
    """
    weighted = context.weigh(kept)
    elected = torch.where(sum_in_order(weighted) >= 0, 1.0, -1.0).to(kept.dtype)
    agreeing = (weighted * elected).clamp_min_(0)
    total = sum_in_order(agreeing).mul_(elected)
    if aggregate == "sum":
        return total
    share = _total(agreeing.sign_(), context)
    return total.div_(torch.where(share == 0, 1, share))


def _total(inputs: Tensor, context: Context) -> Tensor:
    """Return Σ w_t x_t.

    In the experts' order, so that the length of a chunk cannot change it; and with each product
    rounded before the sum (no fused multiply-add), so that opposite ones cancel to zero exactly.
    """
    return sum_in_order(context.weigh(inputs))


def sum_in_order(inputs: Tensor) -> Tensor:
    """Return Σ x_t over the first dimension, in the experts' order."""
    total = inputs[0].clone()
    for x in inputs[1:]:
        total.add_(x)
    return total
