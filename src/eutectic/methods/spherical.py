"""Interpolation on the sphere."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from eutectic.errors import MethodError
from eutectic.methods.registry import Chunks, Context, Parameters, Rules, Takes, always, register

PARALLEL = 0.9995  # above this cosine the great circle is a straight line to rounding


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

    The whole tensor is one vector. Nearly parallel tensors (cosine above 0.9995) and zero tensors
    are interpolated in a straight line, as mergekit does.

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
