"""Packed rows: INT of 1 to 8 bits (compressed-tensors), and e2m1 in NVFP4 and MXFP4.

    int   W = (code − 2^(bits−1) − zero point) · scale
    fp4   W = number · scale / global scale     (compressed-tensors; ModelOpt multiplies)

Sources: compressed-tensors' `pack-quantized`, `nvfp4-pack-quantized` and `mxfp4-pack-quantized`,
whose arithmetic is followed step by step, and ModelOpt's NVFP4 (`weight_scale`, `weight_scale_2`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.quantised.bits import unpacked, words_of
from eutectic.checkpoint.quantised.codes import Codes, Entries, Read, RowCodes, Stated, Unreadable
from eutectic.checkpoint.quantised.scaled import scales_as_numbers, unpacked_e2m1
from eutectic.conventions_quantised import packed_rows

_FP4_GROUPS = (16, 32)
_FLOAT_SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class PackedInts(RowCodes):
    """A matrix, or a stack of matrices, of packed integers with a scale per group of columns."""

    bits: int
    packed: TensorEntry
    scale: TensorEntry
    zero: TensorEntry | None
    groups: TensorEntry | None  # group of every column; None where groups are equal runs
    grid: int  # scales per row; 0 for one scale in all

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return the width of the integers."""
        return (self.bits,)

    def rows(self, read: Read, first: int, last: int) -> Tensor:
        """Return rows [first, last) of the tensor seen as a matrix, in the entry's dtype."""
        words, width = self.packed.shape[-1], self.width
        packed = read(self.packed.name, first * words, last * words).view(-1, words)
        values = unpacked(packed, self.bits, width).to(torch.float32).sub_(1 << self.bits - 1)
        if not self.grid:
            scale = read(self.scale.name, 0, 1).view(1, 1)
            return values.mul_(scale.to(torch.float32)).to(self.entry.dtype)
        scales = read(self.scale.name, first * self.grid, last * self.grid).view(-1, self.grid)
        group = torch.arange(width) // -(-width // self.grid)
        if self.groups is not None:
            stated = read(self.groups.name, 0, width).to(torch.int64)
            group = group if bool((stated < 0).any()) else stated
        if self.zero is not None:
            values.sub_(self._zeros(read, first, last).to(torch.float32)[:, group])
        return values.mul_(scales.to(torch.float32)[:, group]).to(self.entry.dtype)

    def _zeros(self, read: Read, first: int, last: int) -> Tensor:
        """Return the zero points of some rows; packed ones run down the rows of a matrix."""
        assert self.zero is not None
        if self.zero.dtype is not torch.int32:
            return read(self.zero.name, first * self.grid, last * self.grid).view(-1, self.grid)
        height = self.entry.shape[-2]
        words = self.zero.shape[-2]
        found: list[Tensor] = []
        while first < last:
            matrix, start = divmod(first, height)
            stop = min(height, start + last - first)
            place = matrix * words * self.grid
            packed = read(self.zero.name, place, place + words * self.grid).view(words, -1)
            found.append(unpacked(packed.T, self.bits, height)[:, start:stop].T)
            first += stop - start
        return torch.cat(found).to(torch.float32) - (1 << self.bits - 1)


@dataclass(frozen=True)
class PackedFp4(RowCodes):
    """A matrix, or a stack of matrices, of e2m1 numbers with a scale per group of columns."""

    packed: TensorEntry
    scale: TensorEntry
    common: TensorEntry | None  # one scale for all, or one per matrix
    divides: bool
    group: int

    def rows(self, read: Read, first: int, last: int) -> Tensor:
        """Return rows [first, last) of the tensor seen as a matrix, in the entry's dtype."""
        stored, count = self.width // 2, self.width // self.group
        packed = read(self.packed.name, first * stored, last * stored).view(-1, stored)
        scales = read(self.scale.name, first * count, last * count).view(-1, count)
        scales = scales_as_numbers(scales)
        if self.common is not None:
            common = read(self.common.name, 0, self.common.numel).to(torch.float32)
            height = self.entry.shape[-2]
            matrix = torch.arange(first, last) // height if self.common.numel > 1 else 0
            own = common.view(-1)[matrix].view(-1, 1)
            scales = scales / own if self.divides else scales * own
        values = unpacked_e2m1(packed).view(-1, count, self.group)
        return values.mul_(scales[..., None]).view(-1, self.width).to(self.entry.dtype)


def find(entries: Entries, stated: Stated, read: Read) -> Iterator[Codes | tuple[str, Unreadable]]:
    """Yield the weights that are stored packed along their rows."""
    for name, entry in entries.items():
        weight = packed_rows(name)
        if weight is not None:
            wanted = entry.dtype in (torch.int32, torch.uint8)
        else:  # ModelOpt keeps the name; plain bytes have no second scale
            weight, wanted = name, entry.dtype is torch.uint8 and f"{name}_scale_2" in entries
        if not wanted:
            continue
        scale = entries.get(f"{weight}_scale")
        try:
            if scale is None or len(entry.shape) < 2:
                raise Unreadable("its weight_scale is missing")
            own = _ints if entry.dtype is torch.int32 else _fp4
            yield own(weight, entry, scale, entries, stated, read)
        except Unreadable as error:
            yield name, error


def _ints(
    name: str,
    packed: TensorEntry,
    scale: TensorEntry,
    entries: Entries,
    stated: Stated,
    read: Read,
) -> PackedInts:
    shape = entries.get(f"{name}_shape")
    zero, groups = entries.get(f"{name}_zero_point"), entries.get(f"{name}_g_idx")
    lead, height, words = packed.shape[:-2], packed.shape[-2], packed.shape[-1]
    if shape is None or scale.dtype not in _FLOAT_SCALES:
        raise Unreadable("its weight_shape is missing, or its scales are no floats")
    width = int(read(shape.name, shape.numel - 1, shape.numel)[0])
    bits = words * 32 // max(width, 1)
    if not (1 <= bits <= 8 and words_of(width, bits) == words) or width < 32:
        bits = next((b for b in _stated_bits(stated) if words_of(width, b) == words), 0)
    if not bits:
        raise Unreadable(f"{words} words do not hold {width} integers without gaps")
    rows = math.prod((*lead, height))
    grid = 0 if scale.numel == 1 else scale.numel // rows
    if grid and (scale.numel != grid * rows or width % grid):
        raise Unreadable(f"{scale.numel} scales do not fit [{rows}, {width}]")
    if zero is not None:
        fits = zero.numel == scale.numel
        if zero.dtype is torch.int32:
            fits = zero.shape == (*lead, words_of(height, bits), grid)
        if not fits or not grid:
            raise Unreadable(f"zero points {list(zero.shape)} do not fit the scales")
    if groups is not None and groups.numel != width:
        raise Unreadable(f"{groups.numel} entries of g_idx for {width} columns")
    parts = tuple(e for e in (packed, scale, shape, zero, groups) if e is not None)
    entry = _entry(packed, name, (*lead, height, width), scale, stated, parts)
    names = tuple(e.name for e in parts)
    kind = f"int{bits} packed"
    return PackedInts(kind, entry, packed.name, names, bits, packed, scale, zero, groups, grid)


def _fp4(
    name: str,
    packed: TensorEntry,
    scale: TensorEntry,
    entries: Entries,
    stated: Stated,
    read: Read,
) -> PackedFp4:
    del read
    divisor, factor = entries.get(f"{name}_global_scale"), entries.get(f"{name}_scale_2")
    common = divisor or factor
    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    group = shape[-1] // max(scale.shape[-1], 1) if scale.shape else 0
    if group not in _FP4_GROUPS or scale.shape != (*shape[:-1], shape[-1] // group):
        raise Unreadable(f"scales {list(scale.shape)} do not fit {list(shape)} e2m1 numbers")
    if scale.dtype is torch.uint8 and group != 32:
        raise Unreadable("exponents as scales belong to groups of 32")
    if common is not None and common.numel not in (1, math.prod(shape[:-2])):
        raise Unreadable(f"{common.numel} common scales for {list(shape)}")
    if common is None and scale.dtype is not torch.uint8 and scale.dtype.itemsize == 1:
        raise Unreadable("the scale common to its FP8 scales is missing")
    parts = tuple(e for e in (packed, scale, common) if e is not None)
    entry = _entry(packed, name, shape, scale, stated, parts)
    kind = "nvfp4" if group == 16 else "mxfp4"
    names = tuple(e.name for e in parts)
    divides = divisor is not None
    return PackedFp4(kind, entry, packed.name, names, packed, scale, common, divides, group)


def _entry(
    packed: TensorEntry,
    name: str,
    shape: tuple[int, ...],
    scale: TensorEntry,
    stated: Stated,
    parts: tuple[TensorEntry, ...],
) -> TensorEntry:
    return replace(
        packed,
        name=name,
        dtype=stated.dtype_beside(scale.dtype),
        shape=shape,
        offset=-1,
        nbytes=sum(e.nbytes for e in parts),
    )


def _stated_bits(stated: Stated) -> list[int]:
    """Return the widths that the groups of a configuration state."""
    return [int(w["num_bits"]) for w in stated.weights if isinstance(w.get("num_bits"), int)]
