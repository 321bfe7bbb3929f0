"""Matrices given as a product of thin factors, which never become dense here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.linalg import lapack


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix left·right `[out, in]` of rank at most r.

    Attributes:
        left: `[out, r]`.
        right: `[r, in]`.
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the product."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the product."""
        return torch.promote_types(self.left.dtype, self.right.dtype)

    def dense(self) -> Tensor:
        """Return the product `[out, in]`."""
        return self.left @ self.right

    def core(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return P, K, Q in float64 with left·right = P·K·Qᵀ, P and Q orthonormal, K small.

        The factors are divided by their largest entries first, so that neither over- nor
        underflows; the scales return in K.
        """
        scales = [float(f.abs().max()) if f.numel() else 0.0 for f in (self.left, self.right)]
        left = self.left.double() / (scales[0] or 1.0)
        right = self.right.double() / (scales[1] or 1.0)
        P, R = lapack.qr(left)
        Q, L = lapack.qr(right.mT)
        return P, (R @ L.mT) * (scales[0] * scales[1]), Q
