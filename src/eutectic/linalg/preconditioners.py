"""Approximate inverses of the operators that conjugate gradients solve."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.cg import LinearMap

ROUNDING_ERRORS = 10  # of a Gram's norm: eigenvalues below say nothing
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
    Gradients of a softmax, or before a layer norm, always lie in a subspace.

    Args:
        left: H `[out, out]`, or None for the identity.
        right: A `[in, in]`.
        dtype: of the tensors that it will be applied to.
        unit_roundoff: the largest eps among the dtypes that the Grams came in.

    Cost: one Cholesky inverse and one product a factor, in float64; application two products.
    """
    unit_roundoff = max(unit_roundoff, torch.finfo(dtype).eps)
    right_inverse = _filtered_inverse(right, unit_roundoff).to(dtype)
    if left is None:
        return lambda r: r @ right_inverse
    left_inverse = _filtered_inverse(left, unit_roundoff).to(dtype)
    return lambda r: left_inverse @ r @ right_inverse


def _filtered_inverse(gram: Tensor, unit_roundoff: float) -> Tensor:
    """Return A²(A + εI)⁻³ of the Gram, scaled; the identity where it is indefinite.

    A has a mean diagonal of 1 (a factor on M⁻¹ changes nothing for conjugate gradients) and ε is
    ten rounding errors of its norm.
    """
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    mean = float(gram.diagonal().mean(dtype=torch.float64))
    if not mean > 0:
        return identity
    scaled = gram.double() / mean
    ridge = ROUNDING_ERRORS * unit_roundoff * lapack.norm(scaled)
    while ridge < 1:
        factor = lapack.cholesky(scaled + ridge * identity)
        if factor is not None:
            inverse = torch.cholesky_inverse(factor)
            if ridge * lapack.norm(inverse) > NEGLIGIBLE:
                kept = identity.sub_(inverse, alpha=ridge)  # A(A + εI)⁻¹
                inverse = kept @ inverse @ kept
            return inverse
        ridge *= 10
    return identity
