"""Statistics as operators need them: present, in shape, finite, divided by their counts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.errors import MethodError, NumericalError
from eutectic.methods.grams import Gram, roundoff, scaled_off_diagonal
from eutectic.methods.linear import finite
from eutectic.methods.registry import Context
from eutectic.types import LayerStatistics


def participants(context: Context) -> list[int]:
    """Return the positions of the experts with a positive weight.

    Raises:
        MethodError: a weight is negative, which would make the operator indefinite, or all are 0.
    """
    if min(context.weights) < 0 or max(context.weights) == 0:
        raise MethodError(
            "matching takes weights of at least 0, one of them positive, "
            f"got {list(context.weights)}.\n"
            "A negative weight would leave the quadratic objective without a minimum."
        )
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

    def input_gram(self, t: int, size: int, weight: float) -> Gram:
        """Return `weight`·A_t of expert t, in the form that it is stored in.

        Raises:
            MethodError: none is stored, or it does not fit a matrix with `size` inputs.
            NumericalError: NaN or Inf in it.
        """
        entry = _entry(self.context, t)
        if entry.gram is not None or entry.gram_factor is None:
            return self.square(t, "gram", size, weight)
        scale = weight / self._divisor(t, "gram")
        rows = len(entry.gram_factor)
        _check(entry.gram_factor, "gram_factor", (rows, size), self.context, t)
        stored = entry.gram_factor.to(self.like)
        remainder = None
        if entry.gram_diagonal is not None:
            _check(entry.gram_diagonal, "gram_diagonal", (size,), self.context, t)
            remainder = entry.gram_diagonal.to(self.like) * scale
        if self.off_diagonal != 1:
            own = (1 - self.off_diagonal) * scale * stored.square().sum(0)
            remainder = own if remainder is None else remainder + own
        eps = roundoff(entry.gram_factor)
        return Gram(None, stored, remainder, eps, scale * self.off_diagonal)

    def square(self, t: int, need: str, size: int, weight: float) -> Gram:
        """Return `weight` times a stored square matrix of expert t; see `input_gram`."""
        stored = _stored(self.context, t, need)
        _check(stored, need, (size, size), self.context, t)
        matrix = stored.to(self.like)
        if self.off_diagonal != 1:
            matrix = scaled_off_diagonal(matrix, self.off_diagonal)
        return Gram(matrix, None, None, roundoff(stored), weight / self._divisor(t, need))

    def fisher_diagonal(self, t: int) -> Tensor:
        """Return the diagonal Fisher of expert t, in the shape of `like`, in float64."""
        stored = _stored(self.context, t, "fisher_diagonal")
        _check(stored, "fisher_diagonal", tuple(self.like.shape), self.context, t)
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
    names = ("gram", "gram_factor", "gram_diagonal") if need == "gram" else (need,)
    return [x for x in (getattr(entry, name) for name in names) if x is not None]


def _check(value: Tensor, name: str, shape: tuple[int, ...], context: Context, t: int) -> None:
    if tuple(value.shape) != shape:
        raise MethodError(
            f"{_where(context, t)}: {name} has shape {list(value.shape)}, "
            f"the tensor asks for {list(shape)}.\n"
            "The statistics belong to another layer, layout or checkpoint."
        )
    if not finite(value):
        raise NumericalError(
            f"{_where(context, t)}: NaN or Inf in {name}; nothing was merged.\n"
            "Collect the statistics of this expert again, in float32."
        )


def _where(context: Context, t: int) -> str:
    return f"{context.tensor or 'the tensor'}, expert '{context.experts[t]}'"
