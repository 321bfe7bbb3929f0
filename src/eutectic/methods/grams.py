"""Input Grams in whichever form makes products with them cheap."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

PANEL = 320  # rows of a trapezoidal factor multiplied at once: what lies left of them is zero


@dataclass(frozen=True)
class Gram:
    """A positive semidefinite A `[in, in]`: `scale`·M, or `scale`·FᵀF + diag(`remainder`).

    Nothing is scaled or expanded before it has to be: the stored tensors themselves are multiplied.

    Attributes:
        matrix: M, or None.
        factor: F `[k, in]`, when there is no M.
        remainder: `[in]`, beside the factor; None for zero.
        unit_roundoff: eps of the dtype it was stored in.
        scale: of M, or of FᵀF.
    """

    matrix: Tensor | None
    factor: Tensor | None
    remainder: Tensor | None
    unit_roundoff: float
    scale: float = 1.0

    def dense(self) -> Tensor:
        """Return A `[in, in]`; possibly the stored tensor, so it must not be modified."""
        if self.matrix is not None:
            return self.matrix if self.scale == 1 else self.matrix * self.scale
        if self.factor is None:
            raise ValueError("a Gram holds a matrix or a factor")
        gram = self.factor.T @ self.factor
        gram.mul_(self.scale)
        if self.remainder is not None:
            gram.diagonal().add_(self.remainder)
        return gram

    def diagonal(self) -> Tensor:
        """Return the diagonal `[in]`."""
        if self.matrix is not None:
            return self.matrix.diagonal() * self.scale
        assert self.factor is not None
        squares = self.factor.square().sum(0) * self.scale
        return squares if self.remainder is None else squares + self.remainder

    def cheapest(self) -> Gram:
        """Return the form with the cheaper products: a factor pays below half the entries of A."""
        if self.factor is None:
            return self
        entries = sum(rows.numel() for _, rows in self._panels)
        if 2 * entries < 0.95 * self.factor.shape[1] ** 2:
            return self
        return replace(self, matrix=self.dense(), factor=None, remainder=None, scale=1.0)

    def add_product(
        self, total: Tensor, x: Tensor, *, left: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """Add `scale`·H·X·A `[out, in]` to `total` and return it; `left` is H, or the identity.

        H is applied where the product is narrowest.
        """
        if self.matrix is not None:
            x = x if left is None else left @ x
            return total.addmm_(x, self.matrix, alpha=scale * self.scale)
        # X·Fᵀ as a whole, so that H meets one matrix of k columns.
        shadow = torch.cat([x[:, start:] @ rows.T for start, rows in self._panels], dim=1)
        shadow = shadow if left is None else left @ shadow
        first = 0
        for start, rows in self._panels:
            own = shadow[:, first : first + len(rows)]
            total[:, start:].addmm_(own, rows, alpha=scale * self.scale)
            first += len(rows)
        if self.remainder is not None:
            x = x if left is None else left @ x
            total.addcmul_(x, self.remainder, value=scale)
        return total

    @cached_property
    def _panels(self) -> list[tuple[int, Tensor]]:
        """Return the factor as (first column, rows from that column on).

        Collected factors are upper trapezoidal, which saves up to half of the products.
        """
        assert self.factor is not None
        if bool(self.factor.tril(-1).any()):
            return [(0, self.factor)]
        starts = range(0, len(self.factor), PANEL)
        return [(start, self.factor[start : start + PANEL, start:]) for start in starts]


def scaled_off_diagonal(matrix: Tensor, off_diagonal: float) -> Tensor:
    """Return a copy with the off-diagonal entries multiplied by λ."""
    result = matrix * off_diagonal
    result.diagonal().copy_(matrix.diagonal())
    return result


def roundoff(stored: Tensor) -> float:
    """Return eps of the dtype that a statistic came in."""
    return torch.finfo(stored.dtype).eps
