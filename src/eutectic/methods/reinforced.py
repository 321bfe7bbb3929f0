"""RAM: what one expert alone changes is kept whole, what several change is averaged."""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from eutectic.methods.registry import Chunks, Context, Parameters, Rules, Takes, register

PAPER = "Behavior knowledge merge in reinforced agentic models, arXiv 2601.13572"


@dataclass(frozen=True, kw_only=True)
class RamParameters(Parameters):
    """Parameters of `ram`.

    Attributes:
        epsilon: entries of at most this magnitude count as unchanged.
    """

    epsilon: Annotated[float, Ge(0)] = 1e-5


@dataclass(frozen=True, kw_only=True)
class RamplusTlParameters(RamParameters):
    """Parameters of `ramplus_tl`.

    Attributes:
        epsilon: as in `ram`.
        r: how much unique changes are amplified, per shared change for each unique one.
        alpha: the largest number of shared changes per unique one that counts.
    """

    r: float = 0.1
    alpha: Annotated[float, Ge(0)] = 0.2


def _changed(deltas: Tensor, parameters: RamParameters, context: Context) -> Tensor:
    """Return where each expert changes an entry; an expert of weight 0 changes none."""
    shape = (-1, *[1] * (deltas.ndim - 1))
    present = torch.tensor([w != 0 for w in context.weights], device=deltas.device).view(shape)
    return (deltas.abs() > parameters.epsilon) & present


def _merge(
    deltas: Tensor, parameters: RamParameters, context: Context, amplified: tuple[float, ...]
) -> Tensor:
    changed = _changed(deltas, parameters, context)
    alone = changed.sum(0) == 1
    total, share = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for x, mine, w, factor in zip(deltas, changed, context.weights, amplified, strict=True):
        own = torch.where(mine, x, 0)
        total += torch.where(alone, own * (w * factor), own * w)
        share += mine.to(x.dtype) * w
    return total.div_(torch.where(share == 0, 1, share))


@register(
    "ram",
    summary="Keep what one expert alone changes, average what several change.",
    paper=PAPER,
    parameters=RamParameters,
    laws={"permutation", "zero", "absent"},
    takes=Takes(elementwise=True),
)
def ram(deltas: Tensor, parameters: RamParameters, context: Context) -> Tensor:
    """Return Σ w_t Δ_t / Σ w_t per entry, over the experts with |Δ_t| > ε.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: one pass. At T = 1 the entries above ε; zero deltas
    give zero; an entry whose weights sum to zero keeps Σ w_t Δ_t.
    """
    return _merge(deltas, parameters, context, (1.0,) * len(deltas))


def _prepare(
    chunks: Chunks, parameters: RamplusTlParameters, context: Context
) -> tuple[float, ...]:
    """Return each expert's factor 1 + r · min(shared / unique changes, alpha)."""
    shared = unique = torch.zeros(len(context.weights), dtype=torch.int64)
    for chunk in chunks():
        changed = _changed(chunk.flatten(1), parameters, context)
        count = changed.sum(0)
        shared = shared + (changed & (count > 1)).sum(1).cpu()
        unique = unique + (changed & (count == 1)).sum(1).cpu()
    # An expert without unique changes has nothing to amplify.
    ratio = shared.double() / unique.clamp_min(1)
    return tuple((1 + parameters.r * ratio.clamp(0, parameters.alpha)).tolist())


@register(
    "ramplus_tl",
    summary="As ram; unique changes are amplified by what the expert shares, tensor by tensor.",
    paper=PAPER,
    parameters=RamplusTlParameters,
    laws={"permutation", "zero", "absent"},
    takes=Takes(elementwise=True),
    rules=Rules(prepare=_prepare),
)
def ramplus_tl(deltas: Tensor, parameters: RamplusTlParameters, context: Context) -> Tensor:
    """Return as `ram`, entries that one expert alone changes times λ_t.

    λ_t = 1 + r · min(ρ_t, alpha), ρ_t the expert's shared changes for each unique one in this
    tensor.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: two passes. At T = 1 the entries above ε; zero
    deltas give zero.
    """
    return _merge(deltas, parameters, context, context.state)
