"""GPTQ and AWQ: linear layers as packed integers with a scale and a zero point per group of inputs.

    W[o, i] = (q[i, o] − z[g(i), o]) · s[g(i), o]

Both store [in, out], the transpose of the layer's weight. The product is formed in float32, where
it is exact for 16-bit scales, and rounded once. Sources: AutoGPTQ and GPTQModel (`qweight` packed
along the inputs; `qzeros` one too small in the format "gptq", modulo 2^bits as in AutoGPTQ's own
unpacking, as they are in "gptq_v2"; `g_idx` gives the group of every input, in whatever order), and
AutoAWQ's GEMM format (packed along the outputs, eight 4-bit integers of a word in the order 0 2 4
6 1 3 5 7).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eutectic import conventions
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.quantised.bits import unpacked, words_of
from eutectic.checkpoint.quantised.codes import (
    Codes,
    Entries,
    Read,
    RowCodes,
    Stated,
    Transposed,
    Unreadable,
    read_columns,
    rows_per_band,
)
from eutectic.conventions_quantised import packed_layer

_BITS = (2, 3, 4, 8)
# Whose `qweight` is understood, and in which formats; others pack for one kernel.
_METHODS = ("", "gptq", "awq", "auto-round", "auto_round")
_FORMATS = ("", "gptq", "gptq_v2", "gemm", "auto_round:auto_gptq", "auto_round:auto_awq")
_TOGETHER = 32  # outputs that fill whole words, whatever the bits
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where the eight integers of a word lie, by their order


@dataclass(frozen=True)
class _Grouped(RowCodes):
    """A linear layer's weight [out, in], computed in bands of outputs."""

    bits: int
    weight: TensorEntry  # qweight
    zeros: TensorEntry  # qzeros
    scales: TensorEntry
    groups: TensorEntry | None  # g_idx; None where groups are equal runs of inputs
    group_size: int

    @property
    def band(self) -> int:
        """Entries of the rows that are computed at once."""
        outputs, inputs = self.entry.shape
        row_bytes = inputs * self.entry.dtype.itemsize
        return rows_per_band(outputs, row_bytes, _TOGETHER) * inputs

    def _group_of_inputs(self, read: Read) -> Tensor:
        inputs = self.entry.shape[1]
        if self.groups is None:
            return torch.arange(inputs) // self.group_size
        return read(self.groups.name, 0, inputs).to(torch.int64)

    def _scaled(self, read: Read, codes: Tensor, zeros: Tensor, outputs: tuple[int, int]) -> Tensor:
        """Return W of codes `[n, in]` and zero points `[n, groups]`."""
        whole = (0, self.scales.shape[0])
        scales = read_columns(read, self.scales, whole, outputs).to(torch.float32).T
        group = self._group_of_inputs(read)
        values = codes.to(torch.float32).sub_(zeros.to(torch.float32)[:, group])
        return values.mul_(scales[:, group]).to(self.entry.dtype)


@dataclass(frozen=True)
class Gptq(_Grouped):
    """A weight in GPTQ's packing."""

    one_more: bool  # zero points are stored one too small

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return the packing and what the configuration says of it."""
        return (self.bits, self.group_size, self.one_more)

    def rows(self, read: Read, first: int, last: int) -> Tensor:
        """Return the weights of outputs [first, last)."""
        words, inputs = self.weight.shape[0], self.entry.shape[1]
        packed = read_columns(read, self.weight, (0, words), (first, last))
        codes = unpacked(packed.T, self.bits, inputs)
        start = first // _TOGETHER * _TOGETHER
        span = (words_of(start, self.bits), words_of(last, self.bits))
        packed = read_columns(read, self.zeros, (0, self.zeros.shape[0]), span)
        zeros = unpacked(packed, self.bits, last - start)[:, first - start :].to(torch.int32)
        if self.one_more:
            zeros = zeros + 1 & (1 << self.bits) - 1
        return self._scaled(read, codes, zeros.T, (first, last))


@dataclass(frozen=True)
class Awq(_Grouped):
    """A weight in AutoAWQ's GEMM packing."""

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return the packing."""
        return ("awq", self.group_size)

    def rows(self, read: Read, first: int, last: int) -> Tensor:
        """Return the weights of outputs [first, last)."""
        codes, zeros = (
            self._columns(read, held, first, last) for held in (self.weight, self.zeros)
        )
        return self._scaled(read, codes.T, zeros.T, (first, last))

    def _columns(self, read: Read, held: TensorEntry, first: int, last: int) -> Tensor:
        place = len(_AWQ_PLACES)
        span = (first // place, -(-last // place))
        packed = read_columns(read, held, (0, held.shape[0]), span)
        codes = unpacked(packed, self.bits, (span[1] - span[0]) * place)
        codes = codes.view(len(codes), -1, place)[:, :, torch.tensor(_AWQ_PLACES)].flatten(1)
        return codes[:, first - span[0] * place :][:, : last - first]


def find(entries: Entries, stated: Stated) -> Iterator[Codes | tuple[str, Unreadable]]:
    """Yield the weights of layers that hold `qweight`, `qzeros` and `scales`."""
    for name, entry in entries.items():
        module = packed_layer(name)
        if module is None:
            continue
        try:
            yield _grouped(module, entry, entries, stated)
        except Unreadable as error:
            yield name, error


def _grouped(module: str, weight: TensorEntry, entries: Entries, stated: Stated) -> Codes:
    zeros, scales = entries.get(f"{module}.qzeros"), entries.get(f"{module}.scales")
    groups = entries.get(f"{module}.g_idx")
    if zeros is None or scales is None:
        raise Unreadable("qzeros or scales are missing")
    if any(len(e.shape) != 2 for e in (weight, zeros, scales)) or (
        {weight.dtype, zeros.dtype} != {torch.int32} or not scales.dtype.is_floating_point
    ):
        raise Unreadable("qweight, qzeros and scales are not matrices of words and of floats")
    form = _format(stated)
    if stated.method not in _METHODS or form not in _FORMATS:
        raise Unreadable(f"the format '{form or stated.method}' of packed integers")
    found = _gptq_sizes(weight, zeros, scales, groups, stated)
    awq = found is None or stated.method == "awq" or form.endswith("awq")
    if awq:
        fits = weight.shape[1] * 8 == scales.shape[1] and zeros.shape == (
            scales.shape[0],
            weight.shape[1],
        )
        if not fits:
            raise Unreadable("the shapes are neither GPTQ's nor those of AWQ's GEMM format")
        found = 4, weight.shape[0]
    assert found is not None
    bits, inputs = found
    size = _group_size(inputs, scales.shape[0], stated)
    if not size and groups is None:
        raise Unreadable(f"{scales.shape[0]} groups do not divide {inputs} inputs")
    parts = tuple(e for e in (weight, zeros, scales, groups) if e is not None)
    name = f"{module}.weight"
    entry = TensorEntry(
        name,
        stated.dtype_beside(scales.dtype),
        (scales.shape[1], inputs),
        weight.file,
        -1,
        sum(e.nbytes for e in parts),
    )
    names = tuple(e.name for e in parts)
    common = (bits, weight, zeros, scales, groups, size)
    if awq:
        layer: Codes = Awq("awq 4-bit", entry, weight.name, names, *common)
    else:
        layer = Gptq(f"gptq {bits}-bit", entry, weight.name, names, *common, form != "gptq_v2")
    if stated.conv1d and conventions.is_conv1d(name):
        own = replace(entry, shape=entry.shape[::-1])
        return Transposed(layer.kind, own, weight.name, names, layer)
    return layer


def _format(stated: Stated) -> str:
    """Return the packing that a configuration names, "" where it names none."""
    keys = ("checkpoint_format", "packing_format", "format", "version")
    return next((str(v).lower() for k in keys if (v := stated.settings.get(k))), "")


def _gptq_sizes(
    weight: TensorEntry,
    zeros: TensorEntry,
    scales: TensorEntry,
    groups: TensorEntry | None,
    stated: Stated,
) -> tuple[int, int] | None:
    """Return bits and inputs of a layer in GPTQ's packing, None for another packing."""
    outputs = weight.shape[1]
    if scales.shape[1] != outputs or zeros.shape[0] != scales.shape[0]:
        return None
    asked = stated.settings.get("bits")
    for bits in sorted(_BITS, key=lambda bits: bits != asked):
        inputs = weight.shape[0] * 32 // bits
        if zeros.shape[1] == words_of(outputs, bits) and words_of(inputs, bits) == weight.shape[0]:
            if groups is None or groups.shape == (inputs,):
                return bits, inputs
    return None


def _group_size(inputs: int, groups: int, stated: Stated) -> int:
    """Return how many inputs share a scale; 0 where equal groups do not come out."""
    asked = stated.settings.get("group_size")
    if isinstance(asked, int) and asked > 0 and -(-inputs // asked) == groups:
        return asked
    return inputs // groups if groups and inputs % groups == 0 else 0
