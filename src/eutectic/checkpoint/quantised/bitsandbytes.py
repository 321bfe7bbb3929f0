"""bitsandbytes: LLM.int8() with a scale per output, nf4 and fp4 with one per run of entries.

    int8   W = codes · SCB / 127, in float32
    4 bit  W = map[code] · absmax[entry // blocksize], in float32

Two codes share a byte, the first in the high bits. Under double quantisation absmax is itself
stored as codes: nested_map[code] · nested_absmax[block // nested_blocksize] + offset. What
else there is to know stands in a blob of JSON, the dtype of the result among it. A `Conv1D` is
stored as the linear layer that it is, transposed. Source: `bitsandbytes.functional`, whose results
these are bit by bit.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eutectic import conventions
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.quantised.codes import (
    Codes,
    Entries,
    Read,
    RowCodes,
    Stated,
    Transposed,
    Unreadable,
)
from eutectic.conventions_quantised import four_bit_state, int8_layer
from eutectic.storage.small_files import parse_json

_INVERSE_127 = 7.874015718698502e-3  # as bitsandbytes writes it
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Int8(RowCodes):
    """A weight of LLM.int8()."""

    scales: str

    def rows(self, read: Read, first: int, last: int) -> Tensor:
        """Return rows [first, last) of the weight."""
        codes = read(self.anchor, first * self.width, last * self.width).to(torch.float32)
        scales = read(self.scales, first, last).to(torch.float32).view(-1, 1)
        values = codes.view(-1, self.width).mul_(scales).mul_(_INVERSE_127)
        return values.to(self.entry.dtype)


@dataclass(frozen=True)
class FourBit(Codes):
    """A weight in nf4 or fp4; its runs know no rows."""

    stored: TensorEntry
    run: int  # entries that share a scale
    nested_run: int  # scales that share a scale of theirs; 0 where they are stored as numbers
    offset: float  # of nested scales
    count: int  # of scales

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return nothing: what decides the values is stored beside them."""
        return ()

    def decode(self, read: Read, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flattened tensor, 1-D, in the entry's dtype."""
        if start >= stop:
            return torch.empty(0, dtype=self.entry.dtype)
        # The bytes may be stored as if they were wider numbers.
        width = self.stored.dtype.itemsize
        first, last = start // 2 // width, -(-stop // (2 * width))
        packed = read(self.stored.name, first, last).view(torch.uint8)
        codes = torch.stack([packed >> 4, packed & 0xF], dim=-1).flatten()
        codes = codes[start - 2 * width * first : stop - 2 * width * first]
        values = read(self.stored.name + ".quant_map", 0, 16).to(torch.float32)[codes.int()]
        low, high = start // self.run, -(-stop // self.run)
        runs = torch.arange(start, stop) // self.run - low
        return values.mul_(self._scales(read, low, high)[runs]).to(self.entry.dtype)

    def _scales(self, read: Read, first: int, last: int) -> Tensor:
        scales = read(self.stored.name + ".absmax", first, last)
        if not self.nested_run:
            return scales.to(torch.float32)
        numbers = read(self.stored.name + ".nested_quant_map", 0, 256).to(torch.float32)
        low, high = first // self.nested_run, -(-last // self.nested_run)
        nested = read(self.stored.name + ".nested_absmax", low, high).to(torch.float32)
        runs = torch.arange(first, last) // self.nested_run - low
        return numbers[scales.int()].mul_(nested[runs]).add_(self.offset)


def find(entries: Entries, stated: Stated, read: Read) -> Iterator[Codes | tuple[str, Unreadable]]:
    """Yield the weights that bitsandbytes stored."""
    for name, entry in entries.items():
        try:
            if (module := int8_layer(name)) and f"{module}.weight" in entries:
                found: Codes = _int8(module, entry, entries, stated, read)
            elif told := four_bit_state(name):
                found = _four_bit(*told, name, entries, read)
            else:
                continue
        except Unreadable as error:
            yield name, error
            continue
        if stated.conv1d and conventions.is_conv1d(found.entry.name):
            own = replace(found.entry, shape=found.entry.shape[::-1])
            found = Transposed(found.kind, own, found.anchor, found.parts, found)
        yield found


def _int8(module: str, scales: TensorEntry, entries: Entries, stated: Stated, read: Read) -> Int8:
    codes, order = entries[f"{module}.weight"], entries.get(f"{module}.weight_format")
    if codes.dtype is not torch.int8 or len(codes.shape) != 2 or scales.numel != codes.shape[0]:
        raise Unreadable(f"SCB {list(scales.shape)} beside {codes.dtype} {list(codes.shape)}")
    if order is not None and order.numel and int(read(order.name, 0, 1)[0]) != 0:
        raise Unreadable("the codes lie in the order of another device (weight_format)")
    parts = tuple(e for e in (codes, scales, order) if e is not None)
    nbytes = sum(e.nbytes for e in parts)
    entry = replace(codes, dtype=stated.dtype_beside(scales.dtype), offset=-1, nbytes=nbytes)
    names = tuple(e.name for e in parts)
    return Int8("bitsandbytes int8", entry, codes.name, names, scales.name)


def _four_bit(name: str, kind: str, state: str, entries: Entries, read: Read) -> FourBit:
    stored, absmax = entries.get(name), entries.get(f"{name}.absmax")
    if stored is None or absmax is None or f"{name}.quant_map" not in entries:
        raise Unreadable(f"'{name}', its absmax or its quant_map is missing")
    try:
        told = parse_json(read(state, 0, entries[state].numel).numpy().tobytes())
        shape, run = tuple(int(n) for n in told["shape"]), int(told["blocksize"])
        dtype = getattr(torch, str(told["dtype"]).removeprefix("torch."))
        nested_run = int(told["nested_blocksize"]) if "nested_offset" in told else 0
        # As bitsandbytes adds it: in float32.
        offset = torch.tensor(float(told.get("nested_offset", 0.0))).item()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f"its quant_state is not understood ({error})") from None
    count = math.prod(shape)
    sizes = {
        name: (stored.nbytes, -(-count // 2)),
        f"{name}.absmax": (absmax.numel, -(-count // max(run, 1))),
    }
    parts = [name, f"{name}.absmax", f"{name}.quant_map", state]
    if nested_run:
        parts += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
    missing = [part for part in parts if part not in entries]
    wrong = [part for part, (held, wanted) in sizes.items() if held != wanted]
    if missing or wrong or dtype not in _FLOATS or run < 1 or nested_run < 0:
        what = f"{', '.join(missing)} missing" if missing else f"{wrong or told} does not fit"
        raise Unreadable(what)
    nbytes = sum(entries[part].nbytes for part in parts)
    entry = replace(stored, dtype=dtype, shape=shape, offset=-1, nbytes=nbytes)
    kind = f"bitsandbytes {kind}" + (" with double quantisation" if nested_run else "")
    scales = (run, nested_run, offset, absmax.numel)
    return FourBit(kind, entry, name, tuple(parts), stored, *scales)
