"""The core space of thin matrices: small matrices between bases that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.linalg.svd import magnitude, numerical_rank

# Measured: from 0.7 of the shorter side on, the thin QR decompositions cost as much.
THIN = 2 / 3


@dataclass(frozen=True, eq=False)
class CoreSpace:
    """T matrices Δ_t = U·core_t·Vᵀ, all in float64.

    Attributes:
        left: U `[out, m]`, orthonormal columns.
        right: V `[in, n]`, orthonormal columns.
        cores: `[T, m, n]`.
    """

    left: Tensor
    right: Tensor
    cores: Tensor

    def expand(self, core: Tensor) -> LowRank:
        """Return U·core·Vᵀ `[out, in]` as thin factors."""
        return LowRank(self.left @ core.double(), self.right.mT)

    def turned(self, tolerance: float) -> CoreSpace:
        """Return the same in the bases of [Δ_1 … Δ_T] side by side, and one above the other.

        Their singular vectors, which are determined up to signs by the matrices alone; directions
        below `tolerance` of the first are left out.
        """
        P = _left_vectors(torch.cat(list(self.cores), 1), tolerance)
        Q = _left_vectors(torch.cat(list(self.cores.mT), 1), tolerance)
        return CoreSpace(self.left @ P, self.right @ Q, P.mT @ self.cores @ Q)


def core_space(stack: LowRankStack, beside: Sequence[Tensor] = ()) -> CoreSpace:
    """Return bases of the stacked factors (thin QR decompositions) and the T cores.

    Args:
        stack: T products of factors `[out, r_t]` and `[r_t, in]`.
        beside: further rows `[k, in]` that V shall span, such as those of input metrics.

    Returns:
        m = min(out, Σ r_t) and n = min(in, Σ r_t + Σ k). Factors that depend on each other get
        arbitrary directions, in which the cores are zero to rounding. Cost: two thin QR
        decompositions, O((out + in)·(Σ r_t)²).
    """
    ranks = [factor.shape[1] for factor in stack.left]
    U, left, left_unit = _basis([factor.mT for factor in stack.left])
    V, right, right_unit = _basis([*stack.right, *beside])
    starts = [sum(ranks[:t]) for t in range(len(ranks))]
    cores = [
        left[:, start : start + rank] @ right[:, start : start + rank].mT
        for start, rank in zip(starts, ranks, strict=True)
    ]
    return CoreSpace(U, V, torch.stack(cores) * (left_unit * right_unit))


def stays_thin(stack: LowRankStack, beside: int = 0) -> bool:
    """Tell whether a core costs less than the expanded matrices; `beside` counts further rows."""
    return stack.rank + beside <= THIN * min(stack.shape[1:])


def _basis(blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor, float]:
    """Return Q `[n, r]`, R `[r, k]` and a unit with unit·Q·R the blocks' rows side by side."""
    rows = torch.cat([block.double() for block in blocks])
    unit = magnitude(rows) or 1.0
    Q, R = lapack.qr((rows / unit).mT)
    return Q, R, unit


def _left_vectors(matrix: Tensor, tolerance: float) -> Tensor:
    """Return the left singular vectors of a wide matrix that stand above a tolerance."""
    # From the triangle of a QR decomposition of the transpose: T times smaller.
    _, R = lapack.qr(matrix.mT)
    U, S, _ = lapack.svd(R.mT)
    return U[:, : numerical_rank(S, tolerance) if float(S.sum()) else 0]
