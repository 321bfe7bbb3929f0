"""Statistics as operators need them: present, in shape, finite, divided by their counts."""

from __future__ import annotations

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


def divisor(context: Context, t: int, need: str, normalize_counts: bool) -> float:
    """Return what the sums of expert t are divided by: tokens, or examples for a Fisher."""
    return float(_examples(_entry(context, t), need)) if normalize_counts else 1.0


def input_gram(
    context: Context, t: int, size: int, *, factor: float, off_diagonal: float, like: Tensor
) -> Gram:
    """Return `factor`·A_t with its off-diagonal entries multiplied by `off_diagonal`.

    It has the dtype and the device of `like`.

    Raises:
        MethodError: the Gram does not fit a matrix with `size` inputs.
        NumericalError: NaN or Inf in it.
    """
    entry = _entry(context, t)
    if entry.gram is not None:
        return dense_gram(
            entry.gram,
            "gram",
            context,
            t,
            size,
            factor=factor,
            off_diagonal=off_diagonal,
            like=like,
        )
    if entry.gram_factor is None:
        raise MethodError(f"{_where(context, t)}: the statistics hold no gram.")
    rows = len(entry.gram_factor)
    _check(entry.gram_factor, "gram_factor", (rows, size), context, t)
    stored = entry.gram_factor.to(like)
    remainder = None
    if entry.gram_diagonal is not None:
        _check(entry.gram_diagonal, "gram_diagonal", (size,), context, t)
        remainder = entry.gram_diagonal.to(like) * factor
    if off_diagonal != 1:
        own = (1 - off_diagonal) * factor * stored.square().sum(0)
        remainder = own if remainder is None else remainder + own
    return Gram(None, stored, remainder, roundoff(entry.gram_factor), factor * off_diagonal)


def dense_gram(
    stored: Tensor,
    name: str,
    context: Context,
    t: int,
    size: int,
    *,
    factor: float,
    off_diagonal: float,
    like: Tensor,
) -> Gram:
    """Return a stored square matrix as a Gram; see `input_gram`."""
    _check(stored, name, (size, size), context, t)
    matrix = stored.to(like)
    if off_diagonal != 1:
        matrix = scaled_off_diagonal(matrix, off_diagonal)
    return Gram(matrix, None, None, roundoff(stored), factor)


def square_statistic(context: Context, t: int, need: str) -> Tensor:
    """Return the stored output-gradient Gram or block Fisher of expert t."""
    value: Tensor | None = getattr(_entry(context, t), need)
    if value is None:
        raise MethodError(f"{_where(context, t)}: the statistics hold no {need}.")
    return value


def fisher_diagonal(context: Context, t: int, like: Tensor, normalize_counts: bool) -> Tensor:
    """Return the diagonal Fisher of expert t, divided by its examples, in float64."""
    stored = square_statistic(context, t, "fisher_diagonal")
    _check(stored, "fisher_diagonal", tuple(like.shape), context, t)
    return stored.to(like.device, torch.float64) / divisor(
        context, t, "fisher_diagonal", normalize_counts
    )


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
