"""DELLA: drop at random, small entries more often, then add up or agree on signs."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from eutectic.methods.linear import weighted_sum
from eutectic.methods.registry import Chunks, Context, Parameters, Rules, Takes, register
from eutectic.methods.sparsify import placed, uniform_numbers
from eutectic.methods.ties import Aggregate, l1_factors, times, weighted_consensus

PAPER = "DELLA-Merging: reducing interference by magnitude-based sampling, arXiv 2406.11617"


@dataclass(frozen=True, kw_only=True)
class DellaLinearParameters(Parameters):
    """Parameters of `della_linear`.

    Attributes:
        density: mean probability of keeping an entry.
        epsilon: the smallest entry of a row is kept with probability density − epsilon, the
            largest with density + epsilon; both within (0, 1) unless density is 1.
        rescale: divide each kept entry by its probability; "l1" gives each tensor the sum of
            magnitudes that it had instead, as mergekit does.
    """

    density: Annotated[float, Gt(0), Le(1)] = 0.5
    epsilon: Annotated[float, Ge(0)] = 0.15
    rescale: bool | Literal["l1"] = True

    def __post_init__(self) -> None:
        low, high = self.density - self.epsilon, self.density + self.epsilon
        if self.density < 1 and not (low > 0 and high < 1):
            raise ValueError(
                f"density ± epsilon must lie within (0, 1), got {low:g} and {high:g}; "
                "choose a smaller epsilon"
            )


@dataclass(frozen=True, kw_only=True)
class DellaParameters(DellaLinearParameters):
    """Parameters of `della`.

    Attributes:
        density: as in `della_linear`.
        epsilon: as in `della_linear`.
        rescale: as in `della_linear`.
        aggregate: mean or sum of the entries that agree with the elected sign.
    """

    aggregate: Aggregate = "mean"


def _sample(deltas: Tensor, parameters: Parameters, context: Context, offset: int) -> Tensor:
    """Return what is kept of whole rows `[T, n]`, divided by its probability if asked for."""
    kept: list[Tensor] = []
    own = context.own or (None,) * len(context.experts)
    flat = deltas.flatten(1)
    for delta, expert, mine in zip(flat, context.experts, own, strict=True):
        told = parameters if mine is None else mine
        assert isinstance(told, DellaLinearParameters)
        if told.density == 1:
            kept.append(delta)
            continue
        chance = _chances(delta.view(-1, context.row_width), told).flatten()
        draws = torch.from_numpy(uniform_numbers(context, ("della", expert), offset, len(delta)))
        left = torch.where(draws.to(delta.device) < chance, delta, 0)
        kept.append((left / chance).to(delta.dtype) if told.rescale is True else left)
    return torch.stack(kept).view(deltas.shape)


def _chances(rows: Tensor, told: DellaLinearParameters) -> Tensor:
    """Return the probability of keeping each entry, linear in the rank of its magnitude."""
    width = rows.shape[1]
    if width == 1:
        return torch.full_like(rows, told.density, dtype=torch.float64)
    order = rows.abs().argsort(dim=1, stable=True)
    steps = torch.arange(width, dtype=torch.float64, device=rows.device) / (width - 1)
    ladder = told.density - told.epsilon + 2 * told.epsilon * steps
    chances = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
    return chances.scatter_(1, order, ladder.expand(rows.shape))


def _prepare(
    chunks: Chunks, parameters: DellaLinearParameters, context: Context
) -> tuple[float, ...]:
    """Return what gives each expert's kept entries its sum of magnitudes, if that is asked for."""
    if parameters.rescale != "l1":
        return ()
    return l1_factors((c, _sample(c, parameters, context, offset)) for offset, c in placed(chunks))


def _reads_ahead(parameters: DellaLinearParameters) -> bool:
    return parameters.rescale == "l1"


@register(
    "della_linear",
    summary="Drop entries at random, small ones of a row more often, rescale, add up.",
    paper=PAPER,
    parameters=DellaLinearParameters,
    laws={"permutation", "homogeneous", "zero", "absent"},
    takes=Takes(elementwise=True, rows=True, per_expert={"density", "epsilon"}),
    rules=Rules(prepare=_prepare, prepares=_reads_ahead),
)
def della_linear(deltas: Tensor, parameters: DellaLinearParameters, context: Context) -> Tensor:
    """Return Σ w_t (m_t ⊙ Δ_t) / p_t, an entry kept with a probability by its rank in the row.

    With rank r = 0 … n−1 of an entry's magnitude among the n of its row,
    p = density − ε + 2ε·r/(n−1); a row of one entry has p = density. Rows are those of the last
    dimension as the file lays it out; a vector is one row.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: a sort of each row and one random number per entry
    and expert; the same once more with `rescale: l1`, which multiplies by Σ|Δ_t| / Σ|m_tΔ_t|
    instead. At density 1 it is task arithmetic; zero deltas give zero.

    Deviations from the source: the random numbers, which depend on seed, tensor and expert only.
    """
    kept = _sample(deltas, parameters, context, context.offset)
    return weighted_sum(times(kept, context.state), context)


@register(
    "della",
    summary="Drop as della_linear does, merge by the sign consensus of TIES.",
    paper=PAPER,
    parameters=DellaParameters,
    laws={"permutation", "homogeneous", "zero", "absent"},
    takes=Takes(elementwise=True, rows=True, per_expert={"density", "epsilon"}),
    rules=Rules(prepare=_prepare, prepares=_reads_ahead),
)
def della(deltas: Tensor, parameters: DellaParameters, context: Context) -> Tensor:
    """Return the merge by the signs of w_t x_t (see `ties`) of what `della_linear` keeps.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: as `della_linear`. Zero deltas give zero.
    """
    kept = _sample(deltas, parameters, context, context.offset)
    return weighted_consensus(times(kept, context.state), context, parameters.aggregate)
