"""Interpolation on the sphere."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from eutectic.errors import MethodError
from eutectic.methods.inner_products import (
    Space,
    Vectors,
    column_products,
    combine,
    inner_products,
    row_products,
    units_of,
)
from eutectic.methods.registry import Chunks, Context, Parameters, Rules, Takes, always, register

PARALLEL = 0.9995  # above this cosine the great circle is a straight line to rounding
ONE_LINE = 1e-12  # 1 − cos² below which two vectors count as one line


@dataclass(frozen=True, kw_only=True)
class SlerpParameters(Parameters):
    """Parameters of `slerp`.

    Attributes:
        t: position between the first expert (0) and the second (1). None: w₂ / (w₁ + w₂).
    """

    t: Annotated[float, Ge(0), Le(1)] | None = None


def _dot_products(chunks: Chunks, parameters: SlerpParameters, context: Context) -> Tensor:
    """Return [<a, a>, <b, b>, <a, b>] in float64."""
    sums = torch.zeros(3, dtype=torch.float64)
    for chunk in chunks():
        a, b = chunk[0].double().flatten(), chunk[1].double().flatten()
        sums += torch.stack([a @ a, b @ b, a @ b]).cpu()
    return sums


def _position(parameters: SlerpParameters, weights: Sequence[float]) -> str | None:
    """Say what is wrong with the weights, or with giving them and `t` too."""
    if parameters.t is not None and len(set(weights)) > 1:
        return f"slerp takes its position from `t` or from the weights {tuple(weights)}, not both."
    total = sum(weights)
    if parameters.t is None and (total == 0 or not 0 <= weights[-1] / total <= 1):
        return f"slerp cannot take t from the weights {tuple(weights)}; give t in [0, 1]."
    return None


@register(
    "slerp",
    summary="Spherical interpolation between the weights of two experts.",
    paper="Animating rotation with quaternion curves, SIGGRAPH 1985",
    parameters=SlerpParameters,
    laws={"permutation", "zero", "copies"},
    takes=Takes(elementwise=True, space=always("weight"), experts=(2, 2)),
    rules=Rules(check=_position, prepare=_dot_products),
)
def slerp(inputs: Tensor, parameters: SlerpParameters, context: Context) -> Tensor:
    """Return sin((1−t)θ)/sin θ · W_1 + sin(tθ)/sin θ · W_2, θ the angle between W_1 and W_2.

    The whole tensor is one vector. Nearly parallel tensors (cosine above 0.9995) are interpolated
    in a straight line, as mergekit does; so are zero tensors, which count as orthogonal there.

    Shapes: `[2, *shape]` -> `[*shape]`. Cost: two passes.

    Raises:
        MethodError: `t` is given and the weights differ, or it is not and they sum to zero.
    """
    if fault := _position(parameters, context.weights):
        raise MethodError(fault)
    t = parameters.t
    if t is None:
        t = context.weights[1] / sum(context.weights)
    aa, bb, ab = (float(x) for x in context.state)
    norms = math.sqrt(aa) * math.sqrt(bb)
    cosine = max(-1.0, min(1.0, ab / norms)) if norms > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return torch.lerp(inputs[0], inputs[1], t)
    theta = math.acos(cosine)
    first, second = math.sin((1 - t) * theta), math.sin(t * theta)
    return (inputs[0] * first + inputs[1] * second) / math.sin(theta)


@dataclass(frozen=True, kw_only=True)
class NuslerpParameters(Parameters):
    """Parameters of `nuslerp`.

    Attributes:
        vectors: what is turned: the whole tensor as one vector, its rows, or its columns.
        space: the experts' deltas, or their weights.
    """

    vectors: Vectors = "tensor"
    space: Space = "delta"


def _kind(parameters: NuslerpParameters, context: Context) -> Vectors:
    """Return the vectors' kind; a tensor of one dimension is one vector."""
    return parameters.vectors if len(context.shape) > 1 else "tensor"


def _nuslerp_products(
    chunks: Chunks, parameters: NuslerpParameters, context: Context
) -> Tensor | None:
    kind = _kind(parameters, context)
    if kind == "rows":
        return None
    return inner_products(chunks) if kind == "tensor" else column_products(chunks, context.shape)


def _summable(parameters: NuslerpParameters, weights: Sequence[float]) -> str | None:
    if sum(weights) != 0:
        return None
    return (
        f"nuslerp takes its position from the weights {tuple(weights)}, which sum to zero.\n"
        "Choose other weights, such as equal ones for the middle."
    )


@register(
    "nuslerp",
    summary="Spherical interpolation of two experts' deltas, by tensor, row or column.",
    paper="Arcee's MergeKit: a toolkit for merging large language models, arXiv 2403.13257",
    parameters=NuslerpParameters,
    laws={"permutation", "homogeneous", "zero", "copies", "rotation"},
    takes=Takes(elementwise=True, rows=True, space=lambda p: p.space, experts=(2, 2)),
    rules=Rules(check=_summable, prepare=_nuslerp_products, prepares=lambda p: p.vectors != "rows"),
)
def nuslerp(inputs: Tensor, parameters: NuslerpParameters, context: Context) -> Tensor:
    """Return sin((1−t)θ)/sin θ · x_1 + sin(tθ)/sin θ · x_2 with t = w_2 / (w_1 + w_2).

    x_1 and x_2 are the deltas (or weights) as one vector, or each row or column; θ is the angle
    between the two. Vectors on one line (1 − cos² ≤ 1e-12) are interpolated in a straight line; a
    zero vector counts as orthogonal. Rows are those of the last dimension as the file lays it out,
    columns run along the first one.

    Shapes: `[2, *shape]` -> `[*shape]`. Cost: two passes; one for rows. Copies of one delta give
    it; zero deltas give zero; rank plays no part.

    Raises:
        MethodError: the weights sum to zero.
    """
    if fault := _summable(parameters, context.weights):
        raise MethodError(fault)
    width = context.row_width
    flat = inputs.flatten(1)
    kind = _kind(parameters, context)
    gram: Tensor | None = context.state
    if gram is None:
        gram = row_products(flat.view(2, -1, width))
    norms, cosines = units_of(gram)
    cosine = torch.where((norms > 0).all(-1), cosines[..., 0, 1], 0)
    t = context.weights[1] / sum(context.weights)
    straight = 1 - cosine.square() <= ONE_LINE
    theta = torch.acos(torch.where(straight, 0, cosine))
    first = torch.where(straight, 1 - t, torch.sin((1 - t) * theta) / torch.sin(theta))
    second = torch.where(straight, t, torch.sin(t * theta) / torch.sin(theta))
    coefficients = torch.stack([first, second])
    if kind == "rows":
        merged = combine(flat.view(2, -1, width), coefficients.unsqueeze(-1))
    elif kind == "columns":
        place = torch.arange(context.offset, context.offset + flat.shape[1])
        merged = combine(flat, coefficients[:, place % coefficients.shape[1]])
    else:
        merged = combine(flat, coefficients)
    return merged.reshape(inputs.shape[1:])
