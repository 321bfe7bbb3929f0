"""Codes that are numbers, times a scale: FP8 and INT8, per tensor, channel, group or block.

    W = (code − zero point) · scale

The product is formed in float32, where it is exact for 16-bit scales, and rounded once. Sources:
transformers' fine-grained FP8 and fbgemm FP8 (`weight_scale_inv` multiplies, as in DeepSeek-V3's
`weight_dequant`), compressed-tensors (`naive-`, `float-` and `int-quantized`). Codes of one byte
with two e2m1 numbers in it, and scales that are exponents of two in a byte, are DeepSeek-V4's and
MXFP8's.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.quantised.codes import Codes, Entries, Read, RowCodes, Stated, Unreadable
from eutectic.conventions_quantised import scale_names

FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)
_E8M0 = getattr(torch, "float8_e8m0fnu", None)
_SCALES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, _E8M0)
_BLOCK = (128, 128)  # DeepSeek's, where no configuration says otherwise
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*_E2M1, *(-value for value in _E2M1)])  # by the four bits, sign first


def scales_as_numbers(scales: Tensor) -> Tensor:
    """Return scales in float32; bytes are exponents of two with the bias 127."""
    if scales.dtype is torch.uint8:
        return torch.exp2(scales.to(torch.float32) - 127.0)
    return scales.to(torch.float32)


def unpacked_e2m1(packed: Tensor) -> Tensor:
    """Return the two e2m1 numbers of every byte, low bits first: `[…, n]` -> `[…, 2 n]`."""
    packed = packed.view(torch.uint8)
    codes = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
    return E2M1[codes.int()]


@dataclass(frozen=True)
class Scaled(RowCodes):
    """A matrix, or a stack of matrices, of codes on a grid of scales."""

    codes: TensorEntry
    scale: TensorEntry
    zero: TensorEntry | None
    stacked: bool  # the scales have a grid for every matrix of the stack
    grid: tuple[int, int]  # scales per matrix
    block: tuple[int, int]  # entries that share a scale

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return the size of blocks, which the configuration may state."""
        return self.block

    def rows(self, read: Read, first: int, last: int) -> Tensor:
        """Return rows [first, last) of the tensor seen as a matrix, in the entry's dtype."""
        width, stored = self.width, self.codes.shape[-1] if self.codes.shape else 1
        codes = read(self.codes.name, first * stored, last * stored).view(last - first, stored)
        paired = codes.dtype is torch.int8 and stored * 2 == width
        values = unpacked_e2m1(codes) if paired else codes.to(torch.float32)
        if self.zero is not None:
            values = values - self._spread(read, self.zero, first, last).to(torch.float32)
        scales = scales_as_numbers(self._spread(read, self.scale, first, last))
        return values.mul_(scales).to(self.entry.dtype)

    def _spread(self, read: Read, held: TensorEntry, first: int, last: int) -> Tensor:
        """Return the grid's numbers for every entry of some rows, as far as they differ."""
        height = math.prod(self.entry.shape[-2:-1])
        down, across = self.grid
        row = torch.arange(first, last)
        lines = row % height // self.block[0]
        if self.stacked:
            lines += row // height * down
        top, bottom = int(lines.min()), int(lines.max()) + 1
        found = read(held.name, top * across, bottom * across).view(-1, across)[lines - top]
        if across == 1:
            return found
        return found.repeat_interleave(self.block[1], dim=1)[:, : self.width]


def find(entries: Entries, stated: Stated) -> Iterator[Codes | tuple[str, Unreadable]]:
    """Yield the logical tensors of codes with a scale beside them, or why there is none."""
    for name, entry in entries.items():
        if entry.dtype not in (*FLOAT8, torch.int8):
            continue
        scale = next((entries[n] for n in scale_names(name) if n in entries), None)
        if scale is None or scale.dtype not in _SCALES:
            continue
        zero = entries.get(f"{name}_zero_point")
        try:
            yield _scaled(entry, scale, zero, stated)
        except Unreadable as error:
            yield name, error


def _scaled(
    codes: TensorEntry, scale: TensorEntry, zero: TensorEntry | None, stated: Stated
) -> Scaled:
    shape = codes.shape
    if codes.dtype is torch.int8 and _is_paired(codes, scale):
        shape = (*shape[:-1], shape[-1] * 2)
    grid, stacked = _grid(shape, scale)
    block = _block(shape, grid, stated)
    if zero is not None and zero.numel != scale.numel:
        raise Unreadable(f"{zero.numel} zero points for {scale.numel} scales")
    parts = tuple(e for e in (codes, scale, zero) if e is not None)
    entry = replace(
        codes,
        dtype=stated.dtype_beside(scale.dtype),
        shape=shape,
        offset=-1,
        nbytes=sum(e.nbytes for e in parts),
    )
    kind = _kind(
        codes, shape, grid, block, in_blocks=bool(stated.settings.get("weight_block_size"))
    )
    names = tuple(e.name for e in parts)
    return Scaled(kind, entry, codes.name, names, codes, scale, zero, stacked, grid, block)


def _is_paired(codes: TensorEntry, scale: TensorEntry) -> bool:
    """Tell two e2m1 numbers in a byte from INT8: only the fine-grained format has inverses."""
    if scale.name == f"{codes.name}_scale" or len(scale.shape) != len(codes.shape):
        return False
    return scale.shape[-1] * 16 == codes.shape[-1] and scale.shape[:-1] == codes.shape[:-1]


def _grid(shape: tuple[int, ...], scale: TensorEntry) -> tuple[tuple[int, int], bool]:
    """Return the scales' grid on one matrix, and whether every matrix of a stack has its own."""
    rows = (1, *shape)[-2]
    stack = shape[:-2]
    held = scale.shape
    if scale.numel == 1:
        return (1, 1), False
    if len(held) > 2 and not stack and held[2:] == (1,) * (len(held) - 2):
        held = held[:2]
    if not stack:
        if held in ((rows,), (rows, 1)):
            return (rows, 1), False
        if len(held) == 2:
            return (held[0], held[1]), False
    elif held[: len(stack)] == stack:
        inner = held[len(stack) :]
        if math.prod(inner) == 1:
            return (1, 1), True
        if inner == (rows,):
            return (rows, 1), True
        if len(inner) == 2:
            return (inner[0], inner[1]), True
    raise Unreadable(f"scales {list(held)} do not fit codes {list(shape)}")


def _block(shape: tuple[int, ...], grid: tuple[int, int], stated: Stated) -> tuple[int, int]:
    """Return how many rows and columns share a scale.

    A side with a scale for all, or one for each, says so itself. Else the configuration's size
    counts, DeepSeek's where there is none, if it gives the grid; else the side in equal parts.
    """
    stated_sizes: list[Any] = [stated.settings.get("weight_block_size")]
    stated_sizes += [weights.get("block_structure") for weights in stated.weights]
    sizes = [s for s in stated_sizes if isinstance(s, list) and len(cast("list[Any]", s)) == 2]
    matrix = (1, *shape)[-2:]
    fitting = (s for s in (*sizes, _BLOCK) if _fits(matrix, grid, s))
    asked = next(fitting, _BLOCK)
    found: list[int] = []
    for side, count, size in zip(matrix, grid, asked, strict=True):
        if count == 1:
            found.append(max(side, 1))
        elif count == side:
            found.append(1)
        elif _fits((side,), (count,), (size,)):
            found.append(size)
        elif count and side % count == 0:
            found.append(side // count)
        else:
            what = f"a grid of {list(grid)} scales does not fit {list(matrix)}"
            raise Unreadable(f"{what} in blocks of {list(asked)}")
    return found[0], found[1]


def _fits(matrix: Sequence[int], grid: Sequence[int], block: Sequence[Any]) -> bool:
    """Tell whether blocks of a size, the last ones cut off, make such a grid."""
    sides = zip(matrix, grid, block, strict=True)
    return all(isinstance(b, int) and b > 0 and -(-m // b) == n for m, n, b in sides)


def _kind(
    codes: TensorEntry,
    shape: tuple[int, ...],
    grid: tuple[int, int],
    block: tuple[int, int],
    *,
    in_blocks: bool,
) -> str:
    number = "fp8" if codes.dtype in FLOAT8 else "int8"
    if codes.shape != shape:
        number = "fp4"
    if grid == (1, 1) and not in_blocks:
        return f"{number} per tensor"
    if block[0] == 1 or block[1] == 1:
        whole = grid[1] == 1 or grid[0] == 1
        return f"{number} per channel" if whole else f"{number} groups"
    return f"{number} blocks"


@dataclass(frozen=True)
class Plain8(Codes):
    """FP8 numbers without a scale, each exactly a number of a wider type."""

    def decode(self, read: Read, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flattened tensor, 1-D, in the entry's dtype."""
        return read(self.anchor, start, stop).to(torch.float32).to(self.entry.dtype)


def plain8(entry: TensorEntry, stated: Stated) -> Plain8:
    """Return FP8 numbers that no scale belongs to as what they are."""
    own = replace(entry, dtype=stated.dtype_beside(torch.float32), offset=-1)
    return Plain8("fp8 without scales", own, entry.name, (entry.name,))
