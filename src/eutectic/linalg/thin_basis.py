"""Orthonormal bases of tall factors, by one Cholesky decomposition of their Gram where it is sound.

A = Q·R with Q = A·X: the Gram of the columns, brought to unit length, has a Cholesky factor L, and
X is its inverse transposed. That is a third of a Householder QR, and Q need not be formed where
only a product Q·K is asked for. The error of Q's orthogonality is eps·cond(L)², of float64; it is
certified by L⁻¹ itself. Where that is larger than `SPREAD`, and for float64 factors, of which more
digits are expected, Householder takes over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.gram import gram

# Largest root mean square of 1/s over the singular values s of L: to here a product A·(X·K) in
# float32 rounds no more than four times what Q·K does, and Q is orthonormal to 1e-9.
SPREAD = 4.0
NORMS = 1e-18, 1e18  # of columns, whose reciprocals float32 has to hold


@dataclass(frozen=True, eq=False)
class ThinBasis:
    """A = Q·R: A itself with X, or Q.

    Attributes:
        columns: A `[n, k]`; or Q `[n, r]` in float64, where X is None.
        inverse: X `[k, k]` with Q = A·X, in float64.
        triangle: R `[r, k]`, in float64.
    """

    columns: Tensor
    inverse: Tensor | None
    triangle: Tensor

    def basis(self) -> Tensor:
        """Return Q `[n, r]` in float64."""
        return self.columns if self.inverse is None else self.columns.double() @ self.inverse

    def times(self, small: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return Q·K `[n, m]`, or Q itself, multiplied in float32 where that is sound."""
        if self.inverse is None:
            return (self.columns if small is None else self.columns @ small).to(dtype)
        inner = self.inverse if small is None else self.inverse @ small
        return (self.columns.float() @ inner.float()).to(dtype)


def thin_basis(columns: Tensor) -> ThinBasis:
    """Return Q and R of A `[n, k]`, any floating dtype; r = min(n, k).

    Cost: n·k² for the Gram, and as much again for each product; of Householder QR 4n·k².
    """
    if columns.dtype != torch.float64 and 0 < columns.shape[1] <= columns.shape[0]:
        found = _by_cholesky(columns)
        if found is not None:
            return found
    Q, R = lapack.qr(columns.double())
    return ThinBasis(Q, None, R)


def _by_cholesky(columns: Tensor) -> ThinBasis | None:
    squared = gram(columns)
    norms = squared.diagonal().sqrt()
    low, high = NORMS
    if not (float(norms.min()) >= low and float(norms.max()) <= high):  # NaN too
        return None
    lower = lapack.cholesky(squared / norms / norms[:, None])
    if lower is None:
        return None
    inverse = lapack.solve_lower(lower, torch.eye(len(lower), dtype=lower.dtype).to(lower))
    if not lapack.norm(inverse) <= SPREAD * math.sqrt(len(lower)):
        return None
    return ThinBasis(columns, inverse.mT / norms[:, None], lower.mT * norms)
