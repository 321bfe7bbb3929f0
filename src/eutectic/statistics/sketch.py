"""Sums of outer products of wide rows, of which no matrix of their width is ever formed."""

from __future__ import annotations

import torch
from torch import Tensor

from eutectic.errors import NumericalError
from eutectic.linalg import lapack
from eutectic.statistics.gram import (
    BLOCK_ROWS,
    MOST,
    GramSum,
    Rank,
    RowSum,
    leading_rows,
    triangular_factor,
)

OVERSAMPLING = 16
PAYS = 2  # a sketch is less work than the matrix from so many times its columns on
_SHIFTS = 12


def columns(rank: Rank) -> int:
    """Return s, the columns of a sketch for so many directions."""
    return 2 * (MOST if rank == "auto" else rank) + OVERSAMPLING


def sketches(width: int, rank: Rank | None) -> bool:
    """Tell whether a sum of so wide rows is sketched."""
    return rank is not None and width >= PAYS * columns(rank)


def sum_of(width: int, rank: Rank | None) -> GramSum | SketchSum:
    """Return an empty sum of rows `[width]`, of which `rank` directions will be kept."""
    if rank is not None and sketches(width, rank):
        return SketchSum(width, rank)
    return GramSum(width)


def sum_bytes(width: int, rank: Rank | None) -> int:
    """Return the bytes that a sum takes."""
    if rank is not None and sketches(width, rank):
        return 8 * width * (2 * columns(rank) + 1)
    return 8 * width**2


class SketchSum(RowSum):
    """Σ x xᵀ over rows x `[d]` as Y = A·Ω `[d, s]`, Ω Gaussian, and the diagonal of A.

    One pass, additive, and the same whatever batches the rows came in. At the end A ≈ Â =
    Y(ΩᵀY)⁺Yᵀ, of which the leading k directions are kept (Tropp, Yurtsever, Udell and Cevher,
    arXiv 1706.05736; s = 2k + 16). Â lies below A, so that the error's nuclear norm is tr A − tr Â:
    known, not estimated, and expected within twice the least possible.

    Memory: 16·d·s bytes. Cost: 4·d·s per row; at the end d·s² in float64.
    """

    def __init__(self, width: int, rank: Rank) -> None:
        super().__init__(width, BLOCK_ROWS)
        self.rank: Rank = rank

    @property
    def most_bytes(self) -> int:
        """How many bytes it takes at most, beside one block of rows."""
        return sum_bytes(self.width, self.rank)

    def tensors(self, rank: Rank | None = None, seed: str = "") -> dict[str, Tensor]:
        """Return `{"factor": F [k, d], "diagonal": e}` in float64, nothing for n = 0.

        A ≈ FᵀF + diag(e), the diagonal of A exact and FᵀF ≤ A. Fewer rows than a block and than k
        give their triangular factor, which is A itself. The arguments are those of `GramSum`; the
        sum's own rank is meant.
        """
        if not self.count:
            return {}
        if not self._sums:
            factor = triangular_factor(self._gather().double())
            return leading_rows(factor, self.rank)
        if self._waiting:
            self._finish()
        return leading_rows(self._root(), self.rank, self._sums["diagonal"])

    def _test(self, like: Tensor) -> Tensor:
        """Return Ω `[d, s]`, the same for all sums of one width and rank: they add up."""
        generator = torch.Generator().manual_seed(self.width)
        drawn = torch.randn(self.width, columns(self.rank), generator=generator)
        return drawn.to(like.device, like.dtype)

    def _multiply(self, rows: Tensor) -> None:
        self._plus("matrix", rows.T @ (rows @ self._test(rows)))
        self._plus("diagonal", rows.double().square().sum(0))

    def _root(self) -> Tensor:
        """Return R `[s, d]` with RᵀR = Â, its rows orthogonal and descending."""
        image = self._sums["matrix"]
        test = self._test(image)
        # The shift silences the rounding of float32 products; it is taken off again.
        shift = torch.finfo(torch.float32).eps * lapack.norm(image)
        if not shift:
            return image.new_zeros(0, self.width)
        for _ in range(_SHIFTS):
            shifted = image + shift * test
            inner = test.T @ shifted
            lower = lapack.cholesky((inner + inner.T) / 2)
            if lower is not None:
                whitened = lapack.solve_lower(lower, shifted.T)
                values, turned = lapack.eigh(whitened @ whitened.T)
                rows = (turned.T @ whitened) / values.clamp_min(shift).sqrt()[:, None]
                return rows * (values - shift).clamp_min(0).sqrt()[:, None]
            shift *= 10
        raise NumericalError(
            "the sketch of a Gram is not positive semidefinite.\n"
            "The inputs are too large or too uneven for float32; collect without a rank."
        )
