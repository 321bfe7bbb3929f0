"""Matrices given as a product of thin factors, which never become dense here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.svd import magnitude


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
        return self.left.to(self.dtype) @ self.right.to(self.dtype)

    def core(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return P, K, Q, unit with left·right = unit·P·K·Qᵀ, P and Q orthonormal, K small.

        All in float64. The unit is that of the factors, a power of two: K keeps its directions
        even where the product is beyond float64 (then the unit is 0 or Inf).
        """
        units = [magnitude(factor) or 1.0 for factor in (self.left, self.right)]
        P, R = lapack.qr(self.left.double() / units[0])
        Q, L = lapack.qr(self.right.double().mT / units[1])
        return P, R @ L.mT, Q, units[0] * units[1]
