"""The thin SVD in float64, the reference that every faster kernel is checked against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.linalg import lapack


@dataclass(frozen=True, eq=False)
class Triplets:
    """Singular triplets M v_i = s_i u_i, s descending.

    Attributes:
        U: left vectors `[out, k]`, orthonormal columns.
        S: singular values `[k]`, float64.
        V: right vectors `[in, k]`, orthonormal columns.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    def first(self, count: int) -> Triplets:
        """Return the `count` leading triplets."""
        return Triplets(self.U[:, :count], self.S[:count], self.V[:, :count])


ROUNDING = 128  # eps of the first singular value: the most that was measured of rounding, and more


def default_tolerance(dtype: torch.dtype, shape: tuple[int, ...] | torch.Size) -> float:
    """Return eps · min(max(out, in), 128): below this fraction of S₁ a value is rounding.

    Measured (`benchmarks/rank_tolerance.py`, sides 384 to 2048): what rounding adds to a sum of
    adapters stands at 0.4 eps of the first singular value if they are expanded in float32, and at
    1, 9 or 90 eps if they come in full float32 checkpoints whose Δ is 10, 1 or 0.1 % of W₀, at any
    side. The smallest of a full-rank sum are about S₁/(2·side). The textbook's eps · max(out, in)
    drops some of these from sides of some hundreds on, and each counts as much as any other once
    the spectrum is flat.

    eps is that of float64 for float64 input and that of float32 for all narrower types: they are
    computed in float32, and a delta of two half-precision numbers is exact there.
    """
    wide = dtype == torch.float64
    eps = torch.finfo(torch.float64 if wide else torch.float32).eps
    return eps * min(max(shape), ROUNDING)


def dependence_tolerance(dtype: torch.dtype) -> float:
    """Return the bound below which unit columns count as dependent on each other.

    For blocks of singular vectors side by side. It is a little above the error of the vectors and
    far below the smallest singular value of independent ones, about 1/n for random subspaces.
    """
    return 1e-10 if dtype == torch.float64 else 1e-6


def numerical_rank(S: Tensor, tolerance: float) -> int:
    """Return how many of the descending singular values lie above `tolerance`·S₁."""
    return int((tolerance * S[0] < S).sum()) if len(S) else 0


def magnitude(matrix: Tensor) -> float:
    """Return the power of two next below the largest absolute entry; 0 for a zero matrix.

    The unit that kernels work in. Dividing by it is exact, where dividing by the entry itself
    would round: that much is visible in the polar factor of an ill-conditioned matrix.
    """
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest else 0.0


def thin_svd(matrix: Tensor) -> Triplets:
    """Return all min(out, in) singular triplets of `[out, in]`, computed in float64.

    The matrix is divided by its magnitude first, so norms of 1e-30 and 1e30 are safe. A zero
    matrix gives zero singular values and the first columns of identity matrices.
    """
    unit = magnitude(matrix) or 1.0
    U, S, V = lapack.svd(matrix.double() / unit)
    return Triplets(U, S * unit, V)
