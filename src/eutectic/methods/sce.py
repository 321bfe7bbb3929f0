"""SCE: select entries that differ, calculate coefficients from energies, erase minority signs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from eutectic.linalg.select import order_statistics
from eutectic.methods.linear import zero_sum
from eutectic.methods.registry import Chunks, Context, Parameters, Rules, Takes, register


@dataclass(frozen=True, kw_only=True)
class SceParameters(Parameters):
    """Parameters of `sce`.

    Attributes:
        select_topk: fraction of the entries that differ between experts which is kept, those of
            largest variance; 1 keeps all entries.
        negligible: energies whose sum is below this count as equal.
    """

    select_topk: Annotated[float, Ge(0), Le(1)] = 1.0
    negligible: Annotated[float, Ge(0)] = 0.0


@dataclass(frozen=True)
class _State:
    """The smallest variance that is kept, and each expert's coefficient."""

    threshold: float
    coefficients: tuple[float, ...]


def _variance(deltas: Tensor, context: Context) -> Tensor:
    """Return Σ w_t (Δ_t − mean)² / Σ w_t, in the experts' order so that chunks do not matter."""
    share = [w / sum(context.weights) for w in context.weights]
    mean = torch.zeros_like(deltas[0])
    for x, w in zip(deltas, share, strict=True):
        mean += x * w
    found = torch.zeros_like(mean)
    for x, w in zip(deltas, share, strict=True):
        found += (x - mean).square() * w
    return found


def _threshold(chunks: Chunks, parameters: SceParameters, context: Context) -> float:
    """Return the variance from which on entries are kept; 0 keeps all."""
    if parameters.select_topk == 1:
        return 0.0
    count = sum(int(torch.count_nonzero(_variance(c, context))) for c in chunks())
    # As torch multiplies a count by a fraction, so that the number is mergekit's.
    k = int(torch.tensor(count) * parameters.select_topk)
    if k == 0:
        return float("inf")

    def variances() -> Iterator[Tensor]:
        return (_variance(c, context).flatten().unsqueeze(0) for c in chunks())

    return float(order_statistics(variances, lambda _: [[k]]))


def _select(deltas: Tensor, threshold: float, context: Context) -> Tensor:
    if threshold == 0:
        return deltas
    return torch.where(_variance(deltas, context) >= threshold, deltas, 0)


def _prepare(chunks: Chunks, parameters: SceParameters, context: Context) -> _State:
    threshold = _threshold(chunks, parameters, context)
    energies, length = torch.zeros(len(context.weights), dtype=torch.float64), 0
    for chunk in chunks():
        kept = _select(chunk, threshold, context).flatten(1)
        energies += kept.double().square().sum(1).cpu()
        length += kept.shape[1]
    w = torch.tensor(context.weights, dtype=torch.float64)
    energies = energies * w / max(length, 1)
    total = energies.sum()
    if abs(total) <= parameters.negligible:
        energies, total = w, w.sum()
    return _State(threshold, tuple((energies / total).tolist()))


@register(
    "sce",
    summary="Keep what differs, weigh experts by their energy, erase minority signs.",
    paper="FuseChat: knowledge fusion of chat models, arXiv 2408.07990",
    parameters=SceParameters,
    laws={"permutation", "homogeneous", "zero", "single", "copies", "absent"},
    takes=Takes(elementwise=True),
    rules=Rules(check=zero_sum, prepare=_prepare),
)
def sce(deltas: Tensor, parameters: SceParameters, context: Context) -> Tensor:
    """Return Σ c_t x_t / Σ c_t over the experts whose sign is that of Σ w_t x_t, per entry.

    x_t keeps the k entries of Δ_t at which the weighted variance over the experts is largest,
    k = select_topk times the number of entries at which it is not 0. c_t = w_t·mean(x_t²), divided
    by their sum. Where votes cancel, plus is elected, as in mergekit.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: two passes, five with select_topk below 1. At T = 1
    the expert itself, or zero with select_topk below 1; zero deltas give zero.

    Raises:
        MethodError: the weights sum to zero.

    Deviations from the source: the weights; entries equal to the threshold are kept.
    """
    state: _State = context.state
    kept = _select(deltas, state.threshold, context)
    votes = torch.zeros_like(kept[0])
    for x, w in zip(kept, context.weights, strict=True):
        votes += x * w
    elected = torch.where(votes >= 0, 1.0, -1.0).to(kept.dtype)
    total, share = torch.zeros_like(votes), torch.zeros_like(votes)
    for x, c in zip(kept, state.coefficients, strict=True):
        agrees = (x * elected > 0).to(kept.dtype)
        total += x * agrees * c
        share += agrees * c
    floor = parameters.negligible
    share = torch.where(share.abs() < floor, floor, share) if floor else share
    return total.div_(torch.where(share == 0, 1, share))
