"""MXFP4 as gpt-oss stores a mixture: blocks of 32 e2m1 numbers with an exponent each.

`X_blocks` [E, out, groups, 16] and `X_scales` [E, out, groups], bytes both, mean the tensor `X`
[E, 32·groups, out], which is the transpose of the rows that are stored; blocks of another size
likewise. Two numbers share a byte, the first in the low bits; the scale is 2^(byte − 127). Source:
transformers' `convert_moe_packed_tensors`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.quantised.codes import (
    Codes,
    Entries,
    Read,
    RowCodes,
    Stated,
    Unreadable,
    read_columns,
    rows_per_band,
)
from eutectic.checkpoint.quantised.scaled import scales_as_numbers, unpacked_e2m1
from eutectic.conventions_quantised import stacked_blocks


@dataclass(frozen=True)
class Mxfp4(RowCodes):
    """The matrices of a mixture, computed in bands of inputs."""

    blocks: TensorEntry
    scales: TensorEntry

    @property
    def group(self) -> int:
        """How many numbers share an exponent."""
        return self.blocks.shape[3] * 2

    @property
    def band(self) -> int:
        """Entries of the rows that are computed at once."""
        _, inputs, outputs = self.entry.shape
        return rows_per_band(inputs, outputs * self.entry.dtype.itemsize, self.group) * outputs

    def rows(self, read: Read, first: int, last: int) -> Tensor:
        """Return rows [first, last) of the stack of matrices [in, out]."""
        inputs = self.entry.shape[1]
        found: list[Tensor] = []
        while first < last:
            expert, start = divmod(first, inputs)
            stop = min(inputs, start + last - first)
            found.append(self._inputs(read, expert, start, stop))
            first += stop - start
        return torch.cat(found) if len(found) > 1 else found[0]

    def _inputs(self, read: Read, expert: int, start: int, stop: int) -> Tensor:
        outputs = self.entry.shape[2]
        own = (expert * outputs, (expert + 1) * outputs)
        group = self.group
        low, high = start // group, -(-stop // group)
        flat = replace(self.blocks, shape=(self.blocks.numel // outputs, self.entry.shape[1] // 2))
        packed = read_columns(read, flat, own, (low * group // 2, high * group // 2))
        scales = read_columns(read, self.scales, own, (low, high)).contiguous()
        values = unpacked_e2m1(packed.contiguous()).view(outputs, high - low, group)
        values = values.mul_(scales_as_numbers(scales)[..., None]).to(self.entry.dtype)
        values = values.view(outputs, -1)[:, start - low * group : stop - low * group]
        return values.T.contiguous()


def find(entries: Entries, stated: Stated) -> Iterator[Codes | tuple[str, Unreadable]]:
    """Yield the tensors that are stored as blocks and scales."""
    for name, blocks in entries.items():
        own = stacked_blocks(name)
        if own is None or blocks.dtype is not torch.uint8:
            continue
        scales = entries.get(f"{own}_scales")
        if scales is None or scales.dtype is not torch.uint8:
            yield name, Unreadable(f"'{own}_scales' is missing")
            continue
        if len(blocks.shape) != 4 or scales.shape != blocks.shape[:3] or 0 in blocks.shape:
            what = f"blocks {list(blocks.shape)} and scales {list(scales.shape)} do not fit"
            yield name, Unreadable(what)
            continue
        count, outputs, groups, width = blocks.shape
        entry = TensorEntry(
            own,
            stated.dtype_beside(torch.uint8),
            (count, groups * width * 2, outputs),
            blocks.file,
            -1,
            blocks.nbytes + scales.nbytes,
        )
        yield Mxfp4("mxfp4", entry, name, (name, scales.name), blocks, scales)
