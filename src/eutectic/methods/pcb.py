"""PCB: every entry weighted by its size within an expert and its agreement with the others."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from eutectic.linalg.select import order_statistics
from eutectic.methods.registry import Chunks, Context, Parameters, Rules, Takes, register
from eutectic.methods.ties import sum_in_order


@dataclass(frozen=True, kw_only=True)
class PcbParameters(Parameters):
    """Parameters of `pcb`.

    Attributes:
        density: fraction of an expert's entries that keeps a weight above 0.
        clamp: fraction of the magnitudes at either end that is drawn in to the rest.
        scope: rank entries within each tensor, or over the whole task vector as the source does.
    """

    density: Annotated[float, Gt(0), Le(1)] = 0.1
    clamp: Annotated[float, Ge(0), Lt(0.5)] = 1e-4
    scope: Literal["tensor", "model"] = "tensor"


@dataclass(frozen=True)
class _State:
    """Per expert: range of magnitudes, and range of balances; `[T, 2]` each, lowest first."""

    magnitudes: Tensor
    balances: Tensor


@register(
    "pcb",
    summary="Mean of the experts' entries, weighted by their size and their agreement.",
    paper="Parameter competition balancing for model merging, arXiv 2410.02396",
    parameters=PcbParameters,
    laws={"permutation", "zero", "absent"},
    takes=Takes(elementwise=True),
    rules=Rules(
        prepare=lambda chunks, parameters, context: _prepare(chunks, parameters, context),
        model_scope=lambda parameters: parameters.scope == "model",
    ),
)
def pcb(deltas: Tensor, parameters: PcbParameters, context: Context) -> Tensor:
    """Return Σ s_t ⊙ x_t / Σ s_t over the entries, with D_t = w_tΔ_t.

    x_t is D_t with |D_t| drawn in to its `clamp` quantiles, n_t those magnitudes mapped to [0, 1],
    b_t = exp(T·n_t²)·tanh(D_t ⊙ ΣD_s) the balance of size within the expert and agreement with all
    of them, s_t the balance of its `density` largest entries mapped to [0, 1], 0 below them.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: five to seven reading passes (quantiles are exact,
    found from histograms) and the merge. At T = 1 the expert's largest entries, drawn in; zero
    deltas give zero; entries that nobody keeps are zero; rank plays no part. T counts experts
    whose weight is not 0.

    Deviations from the source: weights; `scope` is a tensor by default; an expert whose magnitudes
    or balances are all equal has weight 0 (there: 0/0). The factor per expert that the source
    searches by an evolution strategy is the expert's weight here.

    Reference: Du et al., "Parameter Competition Balancing for Model Merging", arXiv 2410.02396.
    """
    state: _State = context.state
    own = context.weigh(deltas)
    balances = _balances(own, state.magnitudes, context)
    low, high = _columns(state.balances, own)
    shares = _unit_interval(balances.clamp(low, high), low, high)
    low, high = _columns(state.magnitudes, own)
    drawn_in = own.sign() * own.abs().clamp(low, high)
    total, mass = torch.zeros_like(own[0]), torch.zeros_like(own[0])
    for x, share in zip(drawn_in, shares, strict=True):
        total += x * share
        mass += share
    return total / torch.where(mass == 0, 1, mass)


def _prepare(chunks: Chunks, parameters: PcbParameters, context: Context) -> _State:
    def weighed() -> Iterator[Tensor]:
        return (context.weigh(chunk).flatten(1) for chunk in chunks())

    def ends(n: int) -> list[list[int]]:  # ranks from the largest, as the official code counts
        lowest = n - int(n * parameters.clamp)
        highest = n - int(n * (1 - parameters.clamp) - 1)
        return [[min(lowest, n), max(min(highest, n), 1)]] * len(context.weights)

    magnitudes = order_statistics(weighed, ends)
    if not magnitudes.numel():
        return _State(torch.zeros(len(context.weights), 2), torch.zeros(len(context.weights), 2))
    magnitudes[:, 1] = torch.maximum(magnitudes[:, 0], magnitudes[:, 1])

    def balances() -> Iterator[Tensor]:
        return (_balances(chunk, magnitudes, context) for chunk in weighed())

    count, highest = 0, torch.full((len(context.weights),), -math.inf, dtype=magnitudes.dtype)
    for chunk in balances():
        count += chunk.shape[1]
        highest = torch.maximum(highest, chunk.amax(1).cpu())
    kept = count - min(int(count * (1 - parameters.density)), count - 1)
    return _State(magnitudes, torch.stack([_largest(balances, kept), highest], 1))


def _balances(own: Tensor, magnitudes: Tensor, context: Context) -> Tensor:
    """Return exp(T·n_t²)·tanh(D_t ⊙ ΣD_s) of weighted deltas `[T, …]`."""
    low, high = _columns(magnitudes, own)
    total = sum_in_order(own)
    members = sum(weight != 0 for weight in context.weights)
    sizes = _unit_interval(own.abs().clamp(low, high), low, high)
    return torch.exp(members * sizes.square()) * torch.tanh(own * total)


def _unit_interval(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return (x - low) / torch.where(high > low, high - low, 1)


def _columns(bounds: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    shape = (-1, *[1] * (like.ndim - 1))
    low, high = bounds.to(like).unbind(1)
    return low.view(shape), high.view(shape)


def _largest(chunks: Callable[[], Iterator[Tensor]], rank: int) -> Tensor:
    """Return the rank-th largest number of each row of a stream; they may be negative."""
    positive = negative = count = None
    for chunk in chunks():
        above, below = (chunk > 0).sum(1).cpu(), (chunk < 0).sum(1).cpu()
        positive = above if positive is None else positive + above
        negative = below if negative is None else negative + below
        count = chunk.shape[1] + (count or 0)
    assert positive is not None and negative is not None and count is not None

    def upper() -> Iterator[Tensor]:
        return (chunk.clamp_min(0) for chunk in chunks())

    found = order_statistics(upper, lambda _: [[rank]] * len(positive)).squeeze(1)
    from_below = count - rank + 1  # among the magnitudes of the negative ones
    if bool((negative >= from_below).any()):

        def lower() -> Iterator[Tensor]:
            return (chunk.neg().clamp_min(0) for chunk in chunks())

        other = order_statistics(lower, lambda _: [[from_below]] * len(positive)).squeeze(1)
        found = torch.where(negative >= from_below, -other, found)
    return found
