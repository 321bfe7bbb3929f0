"""Small integers packed into words: a stream of bits, the lowest of the first word first."""

import torch
from torch import Tensor

_WORD = 32


def words_of(count: int, bits: int) -> int:
    """Return how many 32-bit words hold `count` integers of `bits` bits without gaps."""
    return -(-count * bits // _WORD)


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` integers of each row of words: `[n, words]` int32 -> `[n, count]`.

    Integer i takes the bits from i·bits on, across words where it has to. Bytes for widths that
    divide 8, else int64.
    """
    words = words.contiguous()
    if bits in (1, 2, 4, 8):
        stream = words.view(torch.uint8)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        parts = stream[..., None] >> shifts & (1 << bits) - 1
        return parts.flatten(-2)[..., :count]
    places = torch.arange(count) * bits
    first, shift = places // _WORD, places % _WORD
    # An integer that ends in its word takes nothing of the next: the bits from there are masked.
    wide = words.to(torch.int64) & 0xFFFFFFFF
    wide = torch.nn.functional.pad(wide, (0, 1))
    both = wide[..., first] | wide[..., first + 1] << _WORD
    return both >> shift & (1 << bits) - 1
