"""Statistics as operators need them: present, in shape, finite, divided by their counts.

Input Grams come in whichever form makes products with them cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from eutectic.errors import MethodError
from eutectic.methods.registry import Context, Parameters
from eutectic.types import LayerStatistics, gram_names

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

    def from_left(self, x: Tensor) -> Tensor:
        """Return A·X / `scale`, for X `[in, n]`."""
        if self.matrix is not None:
            return self.matrix @ x
        assert self.factor is not None
        product = self.factor.T @ (self.factor @ x)
        if self.remainder is not None:
            product.addcmul_(x, self.remainder.unsqueeze(1), value=1 / self.scale)
        return product

    def add_product(self, total: Tensor, x: Tensor, *, left: Gram | None = None) -> Tensor:
        """Add H·X·A `[out, in]` to `total` and return it; `left` is H, or the identity.

        H is applied where the product is narrowest.
        """
        scale = 1.0 if left is None else left.scale
        if self.matrix is not None:
            x = x if left is None else left.from_left(x)
            return total.addmm_(x, self.matrix, alpha=scale * self.scale)
        # X·Fᵀ as a whole, so that H meets one matrix of k columns.
        shadow = torch.cat([x[:, start:] @ rows.T for start, rows in self._panels], dim=1)
        shadow = shadow if left is None else left.from_left(shadow)
        first = 0
        for start, rows in self._panels:
            own = shadow[:, first : first + len(rows)]
            total[:, start:].addmm_(own, rows, alpha=scale * self.scale)
            first += len(rows)
        if self.remainder is not None:
            x = x if left is None else left.from_left(x)
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
        starts = range(0, max(len(self.factor), 1), PANEL)  # a factor may have no rows
        return [(start, self.factor[start : start + PANEL, start:]) for start in starts]


def projected(entry: LayerStatistics, basis: Tensor) -> LayerStatistics:
    """Return VᵀA_tV `[n, n]` in place of A_t, for orthonormal columns V `[in, n]`, in float64.

    A Gram of rows alone stays one of rows; of one of rows and a diagonal no matrix of its width is
    formed. Of an entry without a Gram only the counts are left.
    """
    bare = LayerStatistics(count=entry.count, sample_count=entry.sample_count)
    if not entry.has("gram"):
        return bare
    if entry.gram is not None:
        return replace(bare, gram=basis.mT @ entry.gram.to(basis) @ basis)
    assert entry.gram_factor is not None
    rows = entry.gram_factor.to(basis) @ basis
    if entry.gram_diagonal is None:
        return replace(bare, gram_factor=rows)
    rest = basis.mT @ (entry.gram_diagonal.to(basis).unsqueeze(1) * basis)
    return replace(bare, gram=rest.addmm_(rows.mT, rows))


def scaled_off_diagonal(matrix: Tensor, off_diagonal: float) -> Tensor:
    """Return a copy with the off-diagonal entries multiplied by λ."""
    result = matrix * off_diagonal
    result.diagonal().copy_(matrix.diagonal())
    return result


def roundoff(stored: Tensor) -> float:
    """Return eps of the dtype that a statistic came in."""
    return torch.finfo(stored.dtype).eps


def negative_weights(parameters: Parameters, weights: Sequence[float]) -> str | None:
    """Say what is wrong with weights that no quadratic objective can have."""
    del parameters  # whatever they are
    if min(weights) >= 0 and max(weights) > 0:
        return None
    return (
        f"matching takes weights of at least 0, one of them positive, got {list(weights)}.\n"
        "A negative weight would leave the quadratic objective without a minimum."
    )


def participants(context: Context) -> list[int]:
    """Return the positions of the experts with a positive weight; negative ones are refused."""
    if fault := negative_weights(Parameters(), context.weights):
        raise MethodError(fault)
    return [t for t, w in enumerate(context.weights) if w > 0]


def lack(needs: tuple[str, ...], context: Context, normalize_counts: bool) -> str | None:
    """Say in one sentence why the tensor cannot be matched, or return None when it can.

    Experts of weight 0 need no statistics.
    """
    if not needs:
        return None
    for t in participants(context):
        entry = context.statistics[t] if context.statistics is not None else None
        expert = context.experts[t]
        if entry is None:
            return f"expert '{expert}' has no statistics for this tensor"
        for need in needs:
            if not entry.has(need):
                return f"the statistics of expert '{expert}' hold no {need}"
        if normalize_counts and _examples(entry, needs[0]) == 0:
            if any(bool(x.any()) for need in needs for x in _tensors(entry, need)):
                raise MethodError(
                    f"{_where(context, t)}: {needs[0]} is not zero but its count is 0.\n"
                    "Give the count, or set normalize_counts=False to take the sums as they are."
                )
            return f"expert '{expert}' saw no example at this tensor (its count is 0)"
    return None


@dataclass(frozen=True)
class Sums:
    """What was collected of every expert, divided by its counts or not.

    Attributes:
        context: weights and statistics.
        normalize_counts: divide the sums by the tokens, or examples of a Fisher.
        off_diagonal: λ, by which the off-diagonal entries of Grams are multiplied.
        like: Grams come in its dtype and on its device.
    """

    context: Context
    normalize_counts: bool
    off_diagonal: float
    like: Tensor

    def gram(self, t: int, need: str, weight: float) -> Gram:
        """Return `weight` times a sum of outer products of expert t, in the form it is stored in.

        `need` is "gram", "output_gradient_gram" or "block_fisher".
        """
        entry = _entry(self.context, t)
        scale = weight / self._divisor(t, need)
        _, factor, diagonal = (getattr(entry, name, None) for name in gram_names(need))
        if getattr(entry, need) is not None or factor is None:
            stored = _stored(self.context, t, need)
            matrix = stored.to(self.like)
            if self.off_diagonal != 1:
                matrix = scaled_off_diagonal(matrix, self.off_diagonal)
            return Gram(matrix, None, None, roundoff(stored), scale)
        stored = factor.to(self.like)
        remainder = None if diagonal is None else diagonal.to(self.like) * scale
        if self.off_diagonal != 1:
            own = (1 - self.off_diagonal) * scale * stored.square().sum(0)
            remainder = own if remainder is None else remainder + own
        if self.off_diagonal == 0:  # a scale of zero could not be taken out of products
            return Gram(None, stored[:0], remainder, roundoff(factor), scale)
        return Gram(None, stored, remainder, roundoff(factor), scale * self.off_diagonal)

    def fisher_diagonal(self, t: int) -> Tensor:
        """Return the diagonal Fisher of expert t, in the shape of `like`, in float64."""
        stored = _stored(self.context, t, "fisher_diagonal")
        return stored.to(self.like.device, torch.float64) / self._divisor(t, "fisher_diagonal")

    def _divisor(self, t: int, need: str) -> float:
        return float(_examples(_entry(self.context, t), need)) if self.normalize_counts else 1.0


def _stored(context: Context, t: int, need: str) -> Tensor:
    value: Tensor | None = getattr(_entry(context, t), need)
    if value is None:
        raise MethodError(f"{_where(context, t)}: the statistics hold no {need}.")
    return value


def _entry(context: Context, t: int) -> LayerStatistics:
    entry = context.statistics[t] if context.statistics is not None else None
    if entry is None:
        raise MethodError(f"{_where(context, t)}: there are no statistics.")
    return entry


def _examples(entry: LayerStatistics, need: str) -> int:
    """Return the tokens behind a Gram, or the examples behind a Fisher.

    Of a Fisher without them: samples, or tokens where those were not counted either.
    """
    if need in ("fisher_diagonal", "block_fisher"):
        return entry.examples or entry.sample_count or entry.count
    return entry.count


def _tensors(entry: LayerStatistics, need: str) -> list[Tensor]:
    held = (getattr(entry, name, None) for name in gram_names(need))
    return [x for x in held if x is not None]


def _where(context: Context, t: int) -> str:
    return f"{context.tensor or 'the tensor'}, expert '{context.experts[t]}'"
