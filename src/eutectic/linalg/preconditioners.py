"""Approximate inverses of the operators that conjugate gradients solve."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.cg import LinearMap

RELATIVE_RIDGE = 10  # in units of eps: keeps the factors of rank-deficient sums invertible


def jacobi(diagonal: Tensor) -> LinearMap:
    """Return r -> r / diag(C); entries where the diagonal is not positive pass unchanged.

    Args:
        diagonal: diag(C), broadcastable to the shape of r.
    """
    inverse = torch.where(diagonal > 0, 1 / torch.where(diagonal > 0, diagonal, 1), 1)
    return lambda r: r * inverse


def kronecker(left: Tensor | None, right: Tensor, dtype: torch.dtype) -> LinearMap:
    """Return R -> (H + εI)⁻¹ R (A + εI)⁻¹, the inverse of a Kronecker product of two Grams.

    Both factors are decomposed once by Cholesky in float64, which takes a twentieth of an
    eigen-decomposition. They are first divided by the mean of their diagonal (a factor on M⁻¹
    changes nothing for conjugate gradients); ε is ten rounding errors of `dtype`.

    Args:
        left: H `[out, out]`, or None for the identity.
        right: A `[in, in]`.
        dtype: of the tensors that it will be applied to.

    Cost: decomposition (out³ + in³)/3 in float64; application two triangular solves a side, as
    much as a product with each factor.
    """
    right_factor = _factor(right, dtype)
    left_factor = None if left is None else _factor(left, dtype)

    def apply(r: Tensor) -> Tensor:
        if left_factor is not None:
            r = torch.cholesky_solve(r, left_factor)
        return torch.cholesky_solve(r.mT, right_factor).mT

    return apply


def _factor(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the Cholesky factor of the ridged Gram; the identity where the Gram is indefinite."""
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    mean = float(gram.diagonal().mean(dtype=torch.float64))
    ridge = RELATIVE_RIDGE * torch.finfo(dtype).eps
    while mean > 0 and ridge < 1:
        factor = lapack.cholesky(gram.double() / mean + ridge * identity)
        if factor is not None:
            return factor.to(dtype)
        ridge *= 10
    return identity.to(dtype)
