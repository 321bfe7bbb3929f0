"""Inner products of the experts' vectors, summed over a stream: what methods on spheres need.

Everything that interpolates T vectors stays in their span, so a Gram matrix `[T, T]` says all.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from eutectic.methods.registry import Chunks

Vectors = Literal["tensor", "rows", "columns"]
Space = Literal["delta", "weight"]


def inner_products(chunks: Chunks) -> Tensor:
    """Return <x_s, x_t> `[T, T]` in float64 over a stream of chunks `[T, n]`."""
    total = torch.zeros(0, 0, dtype=torch.float64)
    for chunk in chunks():
        x = chunk.flatten(1).double()
        own = (x @ x.mT).cpu()
        total = own if not len(total) else total + own
    return total


def row_products(rows: Tensor) -> Tensor:
    """Return <x_s, x_t> `[R, T, T]` in float64 of the rows of `[T, R, n]`."""
    x = rows.double().transpose(0, 1)
    return x @ x.mT


def column_products(chunks: Chunks, shape: tuple[int, ...]) -> Tensor:
    """Return <x_s, x_t> `[C, T, T]` in float64 of vectors along the first dimension of a stream."""
    count = math.prod(shape[1:])
    total, offset = torch.zeros(count, 0, 0, dtype=torch.float64), 0
    for chunk in chunks():
        x = chunk.flatten(1).double().cpu()
        experts, length = x.shape
        if not total.numel():
            total = torch.zeros(count, experts, experts, dtype=torch.float64)
        place = torch.arange(offset, offset + length) % count
        total.index_add_(0, place, torch.einsum("sn,tn->nst", x, x))
        offset += length
    return total


def units_of(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms `[…, T]` and the Gram `[…, T, T]` of the vectors of length 1.

    A zero vector has no direction: it stays zero, as if orthogonal to all.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0)
    cosines = gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    return norms, cosines.clamp(-1, 1)


def combine(inputs: Tensor, coefficients: Tensor) -> Tensor:
    """Return Σ c_t x_t of `[T, …]`; each c_t is a number, or a tensor that broadcasts."""
    c = coefficients.to(inputs.dtype).to(inputs.device)
    total = inputs[0] * c[0]
    for x, factor in zip(inputs[1:], c[1:], strict=True):
        total = total.add_(x * factor)
    return total
