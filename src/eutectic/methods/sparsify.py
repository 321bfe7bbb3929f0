"""DARE: drop at random and rescale, then a consensus."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from annotated_types import Gt, Le
from torch import Tensor

from eutectic.methods.linear import weighted_sum
from eutectic.methods.registry import Chunks, Context, Parameters, Rules, Takes, register
from eutectic.methods.ties import Aggregate, disjoint_merge, signed_votes

PAPER = "Language models are super Mario, arXiv 2311.03099"


@dataclass(frozen=True, kw_only=True)
class DareParameters(Parameters):
    """Parameters of `dare_linear`.

    Attributes:
        density: probability of keeping an entry.
        rescale: divide the kept entries by density, which keeps the expectation.
    """

    density: Annotated[float, Gt(0), Le(1)] = 0.5
    rescale: bool = True


@dataclass(frozen=True, kw_only=True)
class DareTiesParameters(DareParameters):
    """Parameters of `dare_ties`.

    Attributes:
        density: as in `dare_linear`.
        rescale: as in `dare_linear`.
        aggregate: mean or sum of the entries that agree with the elected sign.
    """

    aggregate: Aggregate = "mean"


def drop(deltas: Tensor, parameters: DareParameters, context: Context, offset: int) -> Tensor:
    """Return Δ_t ⊙ m_t / density, each entry of m_t kept with probability `density`.

    The stream of random numbers depends on (seed, tensor, expert) only, and each entry uses the
    number at its own flat index: order, threads, chunks and resume cannot change it.
    """
    densities = context.each(parameters, "density")
    if all(density == 1 for density in densities):
        return deltas
    rows: list[Tensor] = []
    for delta, expert, density in zip(deltas, context.experts, densities, strict=True):
        stream = np.random.PCG64(context.seed_for("dare", expert))
        stream.advance(offset)
        draws = np.random.Generator(stream).random(delta.numel())
        mask = torch.as_tensor(draws < density).view(delta.shape).to(delta.device)
        kept = torch.where(mask, delta, 0)
        rows.append(kept.div_(density) if parameters.rescale else kept)
    return torch.stack(rows)


@register(
    "dare_linear",
    summary="Drop entries at random, rescale the rest, add up.",
    paper=PAPER,
    parameters=DareParameters,
    laws={"permutation", "homogeneous", "zero", "absent"},
    takes=Takes(elementwise=True, per_expert={"density"}),
)
def dare_linear(deltas: Tensor, parameters: DareParameters, context: Context) -> Tensor:
    """Return Σ w_t (m_t ⊙ Δ_t) / density.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: one pass and one random number per entry and expert.
    At density 1 it is task arithmetic; zero deltas give zero.
    """
    return weighted_sum(drop(deltas, parameters, context, context.offset), context)


def _prepare(chunks: Chunks, parameters: DareTiesParameters, context: Context) -> float:
    total, offset = 0.0, 0
    for chunk in chunks():
        total += signed_votes(drop(chunk, parameters, context, offset), context)
        offset += chunk[0].numel()
    return float((total > 0) - (total < 0))


@register(
    "dare_ties",
    summary="Drop entries at random, rescale the rest, merge by the sign consensus of TIES.",
    paper=PAPER,
    parameters=DareTiesParameters,
    laws={"permutation", "homogeneous", "zero", "absent"},
    takes=Takes(elementwise=True, per_expert={"density"}),
    rules=Rules(prepare=_prepare),
)
def dare_ties(deltas: Tensor, parameters: DareTiesParameters, context: Context) -> Tensor:
    """Return the disjoint merge (see `ties`) of the dropped and rescaled deltas.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: two passes. Zero deltas give zero.
    """
    kept = drop(deltas, parameters, context, context.offset)
    return disjoint_merge(kept, context, context.state, parameters.aggregate)
