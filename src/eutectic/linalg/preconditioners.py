"""Approximate inverses of the operators that conjugate gradients solve."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.cg import LinearMap

ROUNDING_ERRORS = 10  # eigenvalues below so many say nothing
NEGLIGIBLE = 0.1  # ε over the least eigenvalue, from which on its null space has to be left out


def jacobi(diagonal: Tensor) -> LinearMap:
    """Return r -> r / diag(C); entries where the diagonal is not positive pass unchanged.

    Args:
        diagonal: diag(C), broadcastable to the shape of r.
    """
    inverse = torch.where(diagonal > 0, 1 / torch.where(diagonal > 0, diagonal, 1), 1)
    return lambda r: r * inverse


def kronecker(
    left: Tensor | None, right: Tensor, dtype: torch.dtype, unit_roundoff: float = 0.0
) -> LinearMap:
    """Return R -> f(H) R f(A), f(λ) = λ²/(λ + ε)³, in place of H⁻¹ R A⁻¹.

    f is 1/λ where a Gram determines something and goes to 0 in its null space, where an inverse
    would blow up the rounding of residuals until no search direction has curvature any more.
    Gradients of a softmax, or before a layer norm, always lie in a subspace. Of one Gram alone the
    ridged inverse is all but the operator's own: a step or two solve the system before rounding
    grows, and Cholesky solves cost less than forming f(A).

    Args:
        left: H `[out, out]`, or None for the identity.
        right: A `[in, in]`.
        dtype: of the tensors that it will be applied to.
        unit_roundoff: the largest eps among the dtypes that the Grams came in.

    Cost: of two factors a Cholesky inverse and two products each, in float64, and two products an
    application; of one factor n³/3 in float64 and two triangular solves an application.
    """
    unit_roundoff = max(unit_roundoff, torch.finfo(dtype).eps)
    if left is None:
        factor = _factor(right, ROUNDING_ERRORS * unit_roundoff)[0].to(dtype)
        return lambda r: torch.cholesky_solve(r.mT, factor).mT
    left_inverse, right_inverse = (
        _filtered_inverse(gram, unit_roundoff).to(dtype) for gram in (left, right)
    )
    return lambda r: left_inverse @ r @ right_inverse


def _factor(gram: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Return the Cholesky factor of A + εI and ε, raised tenfold where A is too far from positive.

    A is the Gram with a mean diagonal of 1 (a factor on M⁻¹ changes nothing for conjugate
    gradients). The identity, with ε = 0, where it is indefinite.
    """
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    mean = float(gram.diagonal().mean(dtype=torch.float64))
    while mean > 0 and ridge < 1:
        factor = lapack.cholesky(gram.double() / mean + ridge * identity)
        if factor is not None:
            return factor, ridge
        ridge *= 10
    return identity, 0.0


def _filtered_inverse(gram: Tensor, unit_roundoff: float) -> Tensor:
    """Return A²(A + εI)⁻³ of the Gram, ε being ten rounding errors of its norm; see `_factor`."""
    mean = float(gram.diagonal().mean(dtype=torch.float64))
    level = lapack.norm(gram, torch.float64) / mean if mean > 0 else 0.0
    factor, ridge = _factor(gram, ROUNDING_ERRORS * unit_roundoff * level)
    inverse = torch.cholesky_inverse(factor)
    if ridge * lapack.norm(inverse) > NEGLIGIBLE:
        kept = torch.eye(len(gram)).to(inverse).sub_(inverse, alpha=ridge)  # A(A + εI)⁻¹
        inverse = kept @ inverse @ kept
    return inverse
