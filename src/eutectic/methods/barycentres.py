"""Means of several experts on a sphere."""

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from eutectic.errors import MethodError
from eutectic.methods.inner_products import Space, combine, inner_products, units_of
from eutectic.methods.linear import zero_sum
from eutectic.methods.registry import Chunks, Context, Parameters, Rules, Takes, register


@dataclass(frozen=True, kw_only=True)
class MultislerpParameters(Parameters):
    """Parameters of `multislerp`.

    Attributes:
        normalize: divide the weights by their sum.
        eps: a weighted mean of directions that is shorter than this has none; then the weighted
            sum is returned.
        space: the experts' deltas, or their weights.
    """

    normalize: bool = True
    eps: Annotated[float, Ge(0)] = 1e-8
    space: Space = "delta"


def _gram(chunks: Chunks, parameters: Parameters, context: Context) -> Tensor:
    return inner_products(chunks)


@register(
    "multislerp",
    summary="Interpolation of several experts on a sphere, by one step from their mean.",
    paper="Arcee's MergeKit: a toolkit for merging large language models, arXiv 2403.13257",
    parameters=MultislerpParameters,
    laws={"permutation", "homogeneous", "zero", "single", "copies", "absent", "rotation"},
    takes=Takes(elementwise=True, space=lambda p: p.space),
    rules=Rules(check=zero_sum, prepare=_gram),
)
def multislerp(inputs: Tensor, parameters: MultislerpParameters, context: Context) -> Tensor:
    """Return n̄ · (cos|v| · m + sin|v| · v/|v|), one step of interpolation on the unit sphere.

    With u_t = x_t/|x_t|, m = Σ w_t u_t / |Σ w_t u_t|, v = Σ w_t (u_t − <u_t, m> m), and
    n̄ = Σ w_t |x_t|; the weights sum to 1 if `normalize`. The whole tensor is one vector. All of it
    stays in the span of the experts, so it is found from their inner products in float64.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: two passes. At T = 1 the expert itself; zero deltas
    give zero; rank plays no part.

    Raises:
        MethodError: `normalize` with weights that sum to zero.

    Deviations from the source: directions that balance out give Σ w_t x_t for any T (mergekit
    refuses more than two).
    """
    if fault := zero_sum(parameters, context.weights):
        raise MethodError(fault)
    w = torch.tensor(context.weights, dtype=torch.float64)
    if parameters.normalize:
        w = w / w.sum()
    norms, cosines = units_of(context.state)
    length = _length(w, cosines)
    if length <= parameters.eps:
        return combine(inputs, w)
    m = w / length
    v = w - (w @ (cosines @ m)) * m
    angle = _length(v, cosines)
    on_sphere = m * angle.cos() + v * torch.sinc(angle / torch.pi)
    return combine(inputs, _of_units(on_sphere * (w @ norms), norms))


@dataclass(frozen=True, kw_only=True)
class KarcherParameters(Parameters):
    """Parameters of `karcher`.

    Attributes:
        max_iter: most iterations.
        tol: length of a step, in radians, below which the mean is found.
        space: the experts' deltas, or their weights.
    """

    max_iter: Annotated[int, Ge(0)] = 10
    tol: Annotated[float, Gt(0)] = 1e-5
    space: Space = "weight"


@register(
    "karcher",
    summary="Riemannian mean of the experts' directions, with their mean length.",
    paper="Functionality-oriented LLM merging on the Fisher-Rao manifold, arXiv 2603.04972",
    parameters=KarcherParameters,
    laws={"permutation", "zero", "single", "copies", "absent", "rotation"},
    takes=Takes(elementwise=True, space=lambda p: p.space),
    rules=Rules(check=zero_sum, prepare=_gram),
)
def karcher(inputs: Tensor, parameters: KarcherParameters, context: Context) -> Tensor:
    """Return (Σ w_t |x_t|) · m, with m the weighted Karcher mean of the directions x_t/|x_t|.

    m is the point of the sphere with Σ w_t θ_t/sin θ_t (u_t − cos θ_t m) = 0, θ_t the angle
    between u_t and m; the weights sum to 1. It is found from the arithmetic mean of the directions
    by steps along that sum. The whole tensor is one vector. All of it stays in the span of the
    experts, so it is found from their inner products in float64. Zero tensors have no direction:
    they count for the length only.

    Shapes: `[T, *shape]` -> `[*shape]`. Cost: two passes, however many iterations. At T = 1 the
    expert itself; copies give one of them; rank plays no part.

    Raises:
        MethodError: weights that sum to zero.
    """
    if fault := zero_sum(parameters, context.weights):
        raise MethodError(fault)
    w = torch.tensor(context.weights, dtype=torch.float64)
    w = w / w.sum()
    norms, cosines = units_of(context.state)
    mean = _karcher_mean(torch.where(norms > 0, w, 0), cosines, parameters)
    return combine(inputs, _of_units(mean * (w @ norms), norms))


def _karcher_mean(w: Tensor, cosines: Tensor, parameters: KarcherParameters) -> Tensor:
    """Return the mean as coefficients of the unit vectors whose Gram is `cosines`."""
    if not w.any():
        return w
    w = w / w.sum() if w.sum() != 0 else w
    length = _length(w, cosines)
    mean = w / length
    if length < parameters.tol:  # directions that balance out: from the first one
        mean = torch.zeros_like(w)
        mean[w.nonzero()[0]] = 1.0
    for _ in range(parameters.max_iter):
        dots = (cosines @ mean).clamp(-1, 1)
        theta = dots.acos()
        pull = torch.where(theta < parameters.tol, 0, w / torch.sinc(theta / torch.pi))
        step = pull - (pull @ dots) * mean
        angle = _length(step, cosines)
        if angle < parameters.tol:
            break
        mean = mean * angle.cos() + step * torch.sinc(angle / torch.pi)
        mean = mean / _length(mean, cosines)
    return mean


def _length(coefficients: Tensor, cosines: Tensor) -> Tensor:
    """Return the length of Σ c_t u_t."""
    return (coefficients @ cosines @ coefficients).clamp_min(0).sqrt()


def _of_units(coefficients: Tensor, norms: Tensor) -> Tensor:
    """Return the coefficients of x_t for those of u_t = x_t/|x_t|."""
    return torch.where(norms > 0, coefficients / norms.clamp_min(1e-300), 0)
