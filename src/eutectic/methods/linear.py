"""Weighted means of weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.errors import MethodError
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.methods.registry import Context, Parameters, Rules, Takes, always, register


def zero_sum(parameters: Parameters, weights: Sequence[float]) -> str | None:
    """Say what is wrong with weights that a mean divides by."""
    if sum(weights) != 0 or not getattr(parameters, "normalize", True):
        return None
    return (
        f"the experts' weights sum to zero, so their mean is undefined: {tuple(weights)}.\n"
        "Choose other weights, or task_arithmetic, which does not normalise."
    )


def thin_sum(deltas: LowRankStack, parameters: Parameters, context: Context) -> LowRank | None:
    """Return Σ w_t Δ_t as one product of inner size Σ r_t; divided by Σ w_t if `normalize`.

    None where the sum is over weights: the base enters it then, which is not thin.
    """
    total = context.weigh(deltas).total()
    weights = sum(context.weights)
    if getattr(parameters, "normalize", True):
        return LowRank(total.left / weights, total.right)
    return total if weights == 1 else None


@register(
    "average",
    summary="Mean of the experts' weights, weighted and normalised.",
    paper="Model soups: averaging weights of multiple fine-tuned models, arXiv 2203.05482",
    laws={"permutation", "homogeneous", "zero", "single", "copies", "absent", "rotation"},
    takes=Takes(elementwise=True, factors=True, space=always("either")),
    rules=Rules(check=zero_sum, thin=thin_sum),
)
def average(deltas: Tensor | LowRankStack, parameters: Parameters, context: Context) -> Tensor:
    """Return Σ w_t Δ_t / Σ w_t.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: one pass. At T = 1 the expert itself; zero deltas
    give zero; rank plays no part. Thin factors cost one product of inner size Σ r_t and give the
    same up to the rounding of that product.

    Raises:
        MethodError: the weights sum to zero.
    """
    return _mean(deltas, context)


@dataclass(frozen=True, kw_only=True)
class PassthroughParameters(Parameters):
    """Parameters of `passthrough`.

    Attributes:
        scale: the weights are multiplied by it.
    """

    scale: float = 1.0


@register(
    "passthrough",
    summary="One expert's weights as they are, or times a number.",
    paper="Arcee's MergeKit: a toolkit for merging large language models, arXiv 2403.13257",
    parameters=PassthroughParameters,
    laws={"permutation", "zero", "single", "rotation"},
    takes=Takes(elementwise=True, space=always("weight"), experts=(1, 1)),
)
def passthrough(inputs: Tensor, parameters: PassthroughParameters, context: Context) -> Tensor:
    """Return scale · w_1 W_1.

    Shapes: `[1, *shape]` -> `[*shape]`. Cost: one pass. The base does not enter. A scale or weight
    of 1 gives the expert's own numbers.
    """
    factor = parameters.scale * context.weights[0]
    return inputs[0].clone() if factor == 1 else inputs[0] * factor


@dataclass(frozen=True, kw_only=True)
class LinearParameters(Parameters):
    """Parameters of `linear`.

    Attributes:
        normalize: divide by the sum of the weights.
    """

    normalize: bool = True


@register(
    "linear",
    summary="Weighted sum of the experts' weights, normalised unless told otherwise.",
    paper="Model soups: averaging weights of multiple fine-tuned models, arXiv 2203.05482",
    parameters=LinearParameters,
    laws={"permutation", "homogeneous", "zero", "single", "copies", "absent", "rotation"},
    takes=Takes(
        elementwise=True, factors=True, space=lambda p: "either" if p.normalize else "weight"
    ),
    rules=Rules(check=zero_sum, thin=thin_sum),
)
def linear(inputs: Tensor | LowRankStack, parameters: LinearParameters, context: Context) -> Tensor:
    """Return Σ w_t W_t, divided by Σ w_t if `normalize`.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: one pass. At T = 1 the expert itself (normalised).
    Without normalisation the sum is taken over weights, not deltas, so the base does not enter.
    Thin factors as in `average` if `normalize`; without, they are expanded first.

    Raises:
        MethodError: `normalize` with weights that sum to zero.
    """
    return _mean(inputs, context) if parameters.normalize else weighted_sum(inputs, context)


def weighted_sum(inputs: Tensor | LowRankStack, context: Context) -> Tensor:
    """Return Σ w_t x_t over the first dimension, expert by expert in order.

    Of factors, in one product of inner size Σ r_t, which rounds the sum once instead of T times.
    """
    if isinstance(inputs, LowRankStack):
        return context.weigh(inputs).total().dense()
    w = context.weights
    total = inputs[0] * w[0] if w[0] != 1.0 else inputs[0].clone()
    for x, weight in zip(inputs[1:], w[1:], strict=True):
        total.add_(x, alpha=weight)
    return total


def _mean(inputs: Tensor | LowRankStack, context: Context) -> Tensor:
    total = sum(context.weights)
    if fault := zero_sum(Parameters(), context.weights):
        raise MethodError(fault)
    mean = weighted_sum(inputs, context)
    return mean if total == 1 else mean.div_(total)


def mean_of_deltas(deltas: Tensor, context: Context) -> Tensor:
    """Return the weighted mean that biases and norms take; see `average`."""
    return _mean(deltas, context)


def finite(x: Tensor) -> bool:
    """Tell whether every entry is finite, in one cheap pass where it is."""
    if x.numel() == 0 or bool(torch.isfinite(x.sum())):
        return True
    return bool(torch.isfinite(x).all())
