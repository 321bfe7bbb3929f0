"""Exact selection of the k-th largest magnitude over a stream, without sorting."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

DIGIT_BITS = 16


def magnitude_thresholds(
    chunks: Callable[[], Iterator[Tensor]], density: float | Sequence[float], least: int = 0
) -> Tensor:
    """Return, for each row of a stream of `[T, n_c]` chunks, the k-th largest magnitude.

    k = int(density · n) with n the length of a row over all chunks, but at least `least` where
    density is above 0. The bits of non-negative IEEE numbers sort like integers, so the answer is
    found digit by digit from histograms of 16 bits: two passes over float32, four over float64.
    Memory: one histogram a row, whatever n is.

    Args:
        chunks: starts a fresh iteration over the same chunks, all float32 or all float64.
        density: fraction to keep, in [0, 1]; one for all rows, or one for each.
        least: fewest entries to keep of a row that keeps any.

    Returns:
        `[T]` thresholds in the chunks' dtype: |x| ≥ threshold keeps at least k entries (more only
        where magnitudes are equal). k = 0 gives +inf, k = n gives 0.
    """
    counts, dtype = _first_digit(chunks)
    if counts is None:
        return torch.empty(0)
    n = int(counts[0].sum())
    densities = [density] * len(counts) if isinstance(density, (int, float)) else density
    k = torch.tensor(
        [max(int(share * n), min(least, n) if share > 0 else 0) for share in densities]
    )
    settled = torch.where(k == 0, float("inf"), 0.0).to(dtype)
    open_rows = (k > 0) & (k < n)
    if not open_rows.any():
        return settled
    found = _select(chunks, counts, k.clamp(1, n).unsqueeze(1), dtype).squeeze(1)
    return torch.where(open_rows, found, settled)


def order_statistics(
    chunks: Callable[[], Iterator[Tensor]], ranks: Callable[[int], Sequence[Sequence[int]]]
) -> Tensor:
    """Return several magnitudes of each row of a stream by their rank, 1 for the largest.

    Args:
        chunks: as in `magnitude_thresholds`; the same passes and one histogram for each magnitude.
        ranks: from the length n of a row to the ranks `[T][K]`, each in 1 … n.

    Returns:
        `[T, K]` magnitudes in the chunks' dtype; empty where the stream is.
    """
    counts, dtype = _first_digit(chunks)
    n = 0 if counts is None else int(counts[0].sum())
    if counts is None or n == 0:
        return torch.empty(0, 0, dtype=dtype)
    return _select(chunks, counts, torch.tensor(ranks(n)), dtype)


def _select(
    chunks: Callable[[], Iterator[Tensor]], counts: Tensor, k: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the magnitudes of ranks k `[T, K]`; `counts` has the histograms of the first digit."""
    rows, places = k.shape
    prefixes, remaining = _descend(counts.repeat_interleave(places, 0), k.flatten())
    digits = (4 if dtype == torch.float64 else 2) - 1
    for digit in reversed(range(digits)):
        counts = torch.zeros(rows * places, 1 << DIGIT_BITS, dtype=torch.int64)
        for chunk in chunks():
            for row, bits in enumerate(_magnitude_bits(chunk)):
                high = bits >> (DIGIT_BITS * (digit + 1))
                for place in range(row * places, (row + 1) * places):
                    inside = bits[high == prefixes[place]] >> (DIGIT_BITS * digit)
                    counts[place] += torch.bincount(inside & 0xFFFF, minlength=1 << DIGIT_BITS)
        bins, remaining = _descend(counts, remaining)
        prefixes = (prefixes << DIGIT_BITS) | bins
    found = (prefixes if dtype == torch.float64 else prefixes.to(torch.int32)).view(dtype)
    return found.view(rows, places)


def _first_digit(chunks: Callable[[], Iterator[Tensor]]) -> tuple[Tensor | None, torch.dtype]:
    """Histogram the highest digit, which also counts the stream; None of an empty one."""
    counts, dtype = None, torch.float32
    for chunk in chunks():
        dtype = chunk.dtype
        if counts is None:
            counts = torch.zeros(len(chunk), 1 << (DIGIT_BITS - 1), dtype=torch.int64)
        shift = (8 * dtype.itemsize) - DIGIT_BITS
        for row, bits in enumerate(_magnitude_bits(chunk)):
            counts[row] += torch.bincount(bits >> shift, minlength=1 << (DIGIT_BITS - 1))
    return counts, dtype


def _magnitude_bits(chunk: Tensor) -> Tensor:
    integers = torch.int64 if chunk.dtype == torch.float64 else torch.int32
    return chunk.cpu().abs().flatten(1).view(integers)


def _descend(counts: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return, per row, the bin of the k-th largest entry and its rank inside that bin."""
    from_top = counts.flip(1).cumsum(1)
    position = torch.searchsorted(from_top, k.unsqueeze(1)).squeeze(1)
    before = torch.where(
        position > 0, from_top.gather(1, (position - 1).clamp_min(0).unsqueeze(1)).squeeze(1), 0
    )
    return counts.shape[1] - 1 - position, k - before
