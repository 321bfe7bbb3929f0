"""DARE: drop at random and rescale, then a consensus."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Gt, Le
from numpy.typing import NDArray
from torch import Tensor

from eutectic.methods.linear import weighted_sum
from eutectic.methods.registry import Chunks, Context, Parameters, Rules, Takes, register
from eutectic.methods.ties import (
    Aggregate,
    Consensus,
    disjoint_merge,
    l1_factors,
    signed_votes,
    times,
    weighted_consensus,
)

PAPER = "Language models are super Mario, arXiv 2311.03099"


@dataclass(frozen=True, kw_only=True)
class DareParameters(Parameters):
    """Parameters of `dare_linear`.

    Attributes:
        density: probability of keeping an entry.
        rescale: divide the kept entries by density, which keeps the expectation; "l1" gives each
            tensor the sum of magnitudes that it had before, as mergekit does.
    """

    density: Annotated[float, Gt(0), Le(1)] = 0.5
    rescale: bool | Literal["l1"] = True


@dataclass(frozen=True, kw_only=True)
class DareTiesParameters(DareParameters):
    """Parameters of `dare_ties`.

    Attributes:
        density: as in `dare_linear`.
        rescale: as in `dare_linear`.
        aggregate: mean or sum of the entries that agree with the elected sign.
        consensus: which entries agree, as in `ties`.
    """

    aggregate: Aggregate = "mean"
    consensus: Consensus = "paper"


@dataclass(frozen=True)
class DareState:
    """The majority sign (−1, 0 or 1), and what each expert's kept entries are multiplied by."""

    majority: float = 0.0
    factors: tuple[float, ...] = ()


def uniform_numbers(
    context: Context, salt: tuple[str, str], offset: int, count: int
) -> NDArray[np.float64]:
    """Return the numbers in [0, 1) of `count` entries of a tensor from flat index `offset` on."""
    stream = np.random.PCG64(context.seed_for(*salt))
    stream.advance(offset)
    return np.random.Generator(stream).random(count)


def drop(deltas: Tensor, parameters: DareParameters, context: Context, offset: int) -> Tensor:
    """Return Δ_t ⊙ m_t / density, each entry of m_t kept with probability `density`.

    Without the division unless `rescale` is true.

    The stream of random numbers depends on (seed, tensor, expert) only, and each entry uses the
    number at its own flat index: order, threads, chunks and resume cannot change it.
    """
    densities = context.each(parameters, "density")
    if all(density == 1 for density in densities):
        return deltas
    rows: list[Tensor] = []
    for delta, expert, density in zip(deltas, context.experts, densities, strict=True):
        draws = uniform_numbers(context, ("dare", expert), offset, delta.numel())
        mask = torch.as_tensor(draws < density).view(delta.shape).to(delta.device)
        kept = torch.where(mask, delta, 0)
        rows.append(kept.div_(density) if parameters.rescale is True else kept)
    return torch.stack(rows)


def _factors(chunks: Chunks, parameters: DareParameters, context: Context) -> tuple[float, ...]:
    """Return what gives each expert's kept entries its sum of magnitudes, if that is asked for."""
    if parameters.rescale != "l1":
        return ()
    return l1_factors(
        (chunk, drop(chunk, parameters, context, offset)) for offset, chunk in placed(chunks)
    )


def placed(chunks: Chunks) -> Iterator[tuple[int, Tensor]]:
    """Yield each chunk with the flat index of its first entry."""
    offset = 0
    for chunk in chunks():
        yield offset, chunk
        offset += chunk[0].numel()


def _prepare_linear(chunks: Chunks, parameters: DareParameters, context: Context) -> DareState:
    return DareState(factors=_factors(chunks, parameters, context))


@register(
    "dare_linear",
    summary="Drop entries at random, rescale the rest, add up.",
    paper=PAPER,
    parameters=DareParameters,
    laws={"permutation", "homogeneous", "zero", "absent"},
    takes=Takes(elementwise=True, per_expert={"density"}),
    rules=Rules(prepare=_prepare_linear, prepares=lambda p: p.rescale == "l1"),
)
def dare_linear(deltas: Tensor, parameters: DareParameters, context: Context) -> Tensor:
    """Return Σ w_t (m_t ⊙ Δ_t) / density.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: one pass and one random number per entry and expert;
    a pass more with `rescale: l1`, which divides by Σ|m_tΔ_t| / Σ|Δ_t| instead of density.
    At density 1 it is task arithmetic; zero deltas give zero.
    """
    state: DareState = context.state or DareState()
    kept = drop(deltas, parameters, context, context.offset)
    return weighted_sum(times(kept, state.factors), context)


def _prepare(chunks: Chunks, parameters: DareTiesParameters, context: Context) -> DareState:
    factors = _factors(chunks, parameters, context)
    if parameters.consensus == "weighted":
        return DareState(factors=factors)
    total = 0.0
    for offset, chunk in placed(chunks):
        total += signed_votes(times(drop(chunk, parameters, context, offset), factors), context)
    return DareState(float((total > 0) - (total < 0)), factors)


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
    state: DareState = context.state or DareState()
    kept = times(drop(deltas, parameters, context, context.offset), state.factors)
    if parameters.consensus == "weighted":
        return weighted_consensus(kept, context, parameters.aggregate)
    return disjoint_merge(kept, context, state.majority, parameters.aggregate)
