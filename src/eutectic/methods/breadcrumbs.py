"""Model Breadcrumbs: drop the smallest entries and the outliers, then add up or agree on signs."""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from eutectic.linalg.select import order_statistics
from eutectic.methods.linear import weighted_sum
from eutectic.methods.registry import Chunks, Context, Parameters, Rules, Takes, register
from eutectic.methods.ties import Aggregate, Rescale, l1_factors, times, weighted_consensus

PAPER = "Model Breadcrumbs: scaling multi-task model merging with sparse masks, arXiv 2312.06795"


@dataclass(frozen=True, kw_only=True)
class BreadcrumbsParameters(Parameters):
    """Parameters of `breadcrumbs`.

    Attributes:
        density: fraction of entries kept per expert.
        gamma: fraction of the largest entries that is dropped, as far as `density` leaves room.
        rescale: "l1" gives each thinned delta the sum of magnitudes that it had.
    """

    density: Annotated[float, Ge(0), Le(1)] = 0.1
    gamma: Annotated[float, Ge(0), Le(1)] = 0.01
    rescale: Rescale = False


@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTiesParameters(BreadcrumbsParameters):
    """Parameters of `breadcrumbs_ties`.

    Attributes:
        density: as in `breadcrumbs`.
        gamma: as in `breadcrumbs`.
        rescale: as in `breadcrumbs`.
        aggregate: mean or sum of the entries that agree with the elected sign.
    """

    density: Annotated[float, Ge(0), Le(1)] = 0.2
    aggregate: Aggregate = "mean"


@dataclass(frozen=True)
class _State:
    """The magnitudes that each expert keeps, from `least` to `most` `[T]`, and factors."""

    least: Tensor
    most: Tensor
    factors: tuple[float, ...] = ()


def _prepare(chunks: Chunks, parameters: BreadcrumbsParameters, context: Context) -> _State:
    densities = context.each(parameters, "density")
    gammas = context.each(parameters, "gamma")
    settled = [density == 1 for density in densities]
    empty = [False] * len(densities)
    least = torch.zeros(len(densities), dtype=torch.float64)
    most = torch.full_like(least, torch.inf)

    def ranks(n: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for t, (density, gamma) in enumerate(zip(densities, gammas, strict=True)):
            kept = int(density * n)
            above = min(int(gamma * n), n - kept)
            empty[t] = kept == 0
            found.append((min(above + 1, n), max(above + kept, 1)))
        return found

    if not all(settled):
        bounds = order_statistics(chunks, ranks)
        for t in range(len(bounds)):
            if not settled[t]:
                most[t], least[t] = bounds[t]
            if empty[t]:
                least[t] = torch.inf
    state = _State(least, most)
    if not parameters.rescale:
        return state
    factors = l1_factors((chunk, _thin(chunk, state)) for chunk in chunks())
    return _State(least, most, factors)


def _thin(deltas: Tensor, state: _State) -> Tensor:
    shape = (-1, *[1] * (deltas.ndim - 1))
    least = state.least.to(deltas).view(shape)
    most = state.most.to(deltas).view(shape)
    size = deltas.abs()
    kept = torch.where((size >= least) & (size <= most), deltas, 0)
    return times(kept, state.factors)


@register(
    "breadcrumbs",
    summary="Drop the smallest entries and the outliers of each delta, add up.",
    paper=PAPER,
    parameters=BreadcrumbsParameters,
    laws={"permutation", "homogeneous", "zero", "absent"},
    takes=Takes(elementwise=True, per_expert={"density", "gamma"}),
    rules=Rules(prepare=_prepare),
)
def breadcrumbs(deltas: Tensor, parameters: BreadcrumbsParameters, context: Context) -> Tensor:
    """Return Σ w_t (m_t ⊙ Δ_t), m_t keeping magnitudes that are neither small nor outliers.

    Of n entries int(density·n) are kept: those that follow, by magnitude, the int(γ·n) largest;
    fewer outliers are dropped where that leaves less than `density`. All is kept at density 1, and
    nothing of a tensor of fewer than 1/density entries. Magnitudes are ranked in each tensor.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: three passes. Zero deltas give zero.

    Deviations from the source: entries equal to the smallest or largest kept magnitude are kept.
    """
    return weighted_sum(_thin(deltas, context.state), context)


@register(
    "breadcrumbs_ties",
    summary="Drop the smallest entries and the outliers, merge by the sign consensus of TIES.",
    paper=PAPER,
    parameters=BreadcrumbsTiesParameters,
    laws={"permutation", "homogeneous", "zero", "absent"},
    takes=Takes(elementwise=True, per_expert={"density", "gamma"}),
    rules=Rules(prepare=_prepare),
)
def breadcrumbs_ties(
    deltas: Tensor, parameters: BreadcrumbsTiesParameters, context: Context
) -> Tensor:
    """Return the merge by the signs of w_t x_t (see `ties`) of the deltas that `breadcrumbs` keeps.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: three passes. Zero deltas give zero.
    """
    return weighted_consensus(_thin(deltas, context.state), context, parameters.aggregate)
