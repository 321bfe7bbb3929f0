"""The polar factor U Vᵀ of a matrix M = U S Vᵀ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from eutectic.linalg.svd import default_tolerance, thin_svd

Support = Literal["numerical", "full"]


@dataclass(frozen=True, eq=False)
class Polar:
    """A polar factor with its by-products.

    Attributes:
        factor: U Vᵀ `[out, in]` over the kept singular directions, in the input's dtype.
        nuclear_norm: Σ of the kept singular values.
        rank: how many directions were kept.
    """

    factor: Tensor
    nuclear_norm: float
    rank: int

    @property
    def mean_singular_value(self) -> float:
        """Nuclear norm over rank; 0 for a zero matrix."""
        return self.nuclear_norm / self.rank if self.rank else 0.0


def polar(
    matrix: Tensor,
    *,
    support: Support = "numerical",
    rank_tolerance: float | None = None,
    precision: Literal["fast", "exact"] = "fast",
) -> Polar:
    """Return U Vᵀ of M = U S Vᵀ, the nuclear norm and the rank."""
    if rank_tolerance is None:
        rank_tolerance = default_tolerance(matrix.dtype, matrix.shape)
    t = thin_svd(matrix)
    kept = len(t.S)
    if support == "numerical" and kept:
        kept = int((rank_tolerance * t.S[0] < t.S).sum())
    t = t.first(kept)
    return Polar((t.U @ t.V.mT).to(matrix.dtype), float(t.S.sum()), kept)
