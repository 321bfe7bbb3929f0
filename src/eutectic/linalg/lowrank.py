"""Matrices given as products of thin factors, which become dense only where `dense` says so."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.linalg.svd import magnitude
from eutectic.linalg.thin_basis import ThinBasis, thin_basis


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
        P, core, Q, unit = self.bases()
        return P.basis(), core, Q.basis(), unit

    def bases(self) -> tuple[ThinBasis, Tensor, ThinBasis, float]:
        """Return what `core` does, with bases that are not multiplied out."""
        # Half precision has no room for a division by the unit.
        work = torch.promote_types(self.dtype, torch.float32)
        sides = [factor.to(work) for factor in (self.left, self.right.mT)]
        units = [magnitude(factor) or 1.0 for factor in sides]
        P, Q = (thin_basis(factor / unit) for factor, unit in zip(sides, units, strict=True))
        return P, P.triangle @ Q.triangle.mT, Q, units[0] * units[1]


@dataclass(frozen=True, eq=False)
class LowRankStack:
    """T matrices left_t·right_t: what a stack `[T, out, in]` holds, at the cost of Σ r_t.

    Iterating gives each as a `LowRank`.

    Attributes:
        left: T factors `[out, r_t]`; the r_t may differ, and may be 0.
        right: T factors `[r_t, in]`.
    """

    left: tuple[Tensor, ...]
    right: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.left)

    def __iter__(self) -> Iterator[LowRank]:
        return map(LowRank, self.left, self.right)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(T, out, in)`."""
        return len(self.left), self.left[0].shape[0], self.right[0].shape[1]

    @property
    def rank(self) -> int:
        """Σ r_t."""
        return sum(factor.shape[1] for factor in self.left)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products."""
        return functools.reduce(torch.promote_types, (f.dtype for f in (*self.left, *self.right)))

    @property
    def device(self) -> torch.device:
        """The device of the factors."""
        return self.left[0].device

    def weighted(self, weights: Sequence[float]) -> LowRankStack:
        """Return w_t·left_t·right_t; factors of weight 1 are shared."""
        left = (f if w == 1 else f * w for f, w in zip(self.left, weights, strict=True))
        return LowRankStack(tuple(left), self.right)

    def rows(self, rows: slice) -> LowRankStack:
        """Return some output rows of every product; the right factors are shared."""
        return LowRankStack(tuple(factor[rows] for factor in self.left), self.right)

    def total(self) -> LowRank:
        """Return Σ left_t·right_t as one product of inner size Σ r_t: factors side by side."""
        left = torch.cat([factor.to(self.dtype) for factor in self.left], 1)
        return LowRank(left, torch.cat([factor.to(self.dtype) for factor in self.right]))

    def dense(self) -> Tensor:
        """Return the products `[T, out, in]`."""
        return torch.stack([LowRank(p.left.to(self.dtype), p.right).dense() for p in self])
