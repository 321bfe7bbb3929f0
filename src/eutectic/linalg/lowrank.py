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

        float64 holds the square of anything that float32 can.
        """
        P, R = lapack.qr(self.left.double())
        Q, L = lapack.qr(self.right.double().mT)
        return P, R @ L.mT, Q
