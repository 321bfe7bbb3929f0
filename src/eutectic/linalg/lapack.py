"""The decompositions of `torch.linalg` that this room uses, with types and one order.

Eigenvalues and singular values are descending everywhere.
"""

# torch.linalg carries no annotations.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import torch
from torch import Tensor


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U `[m, r]`, S `[r]` and V `[n, r]` of the thin SVD."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U, S, Vh.mT


def eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors (columns); only the lower triangle is read."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0), vectors.flip(1)


def orthonormal(matrix: Tensor) -> Tensor:
    """Return Q `[m, n]` of the thin QR decomposition."""
    return torch.linalg.qr(matrix).Q


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q `[m, r]` and R `[r, n]` of the thin QR decomposition."""
    Q, R = torch.linalg.qr(matrix)
    return Q, R


def cholesky(symmetric: Tensor) -> Tensor | None:
    """Return the lower Cholesky factor, or None when the matrix is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(symmetric)
    return None if int(failed) else lower


def solve_lower(lower: Tensor, right: Tensor) -> Tensor:
    """Return L⁻¹B."""
    return torch.linalg.solve_triangular(lower, right, upper=False)


def norm(tensor: Tensor, dtype: torch.dtype | None = None) -> float:
    """Return the Frobenius norm, summed in `dtype`."""
    return float(torch.linalg.vector_norm(tensor, dtype=dtype))


def column_norms(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the Euclidean norms of the columns `[n]`, summed in `dtype`."""
    return torch.linalg.vector_norm(matrix, dim=0, dtype=dtype)
