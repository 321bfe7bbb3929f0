"""GGUF: llama.cpp's files, under the names and in the layout of transformers.

Blocks of 32 or 256 numbers of a row, dequantised by the `gguf` package. What llama.cpp's converter
changes is undone: the order of the rows of queries and keys (`turned`), norms with 1 added,
`Conv1D` transposed, experts stacked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.gguf_config import architecture_of, config_of
from eutectic.checkpoint.gguf_file import PLAIN, GgufHeader, GgufTensor, block_of
from eutectic.checkpoint.header import TensorEntry
from eutectic.checkpoint.quantised.codes import Codes, Read, RowCodes, Transposed
from eutectic.conventions_gguf import (
    Architecture,
    is_gguf_buffer,
    is_norm_of_gguf,
    named_in_transformers,
)
from eutectic.errors import CheckpointError, MissingExtraError

_PLAIN_DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}


def library() -> Any:
    """Return the package `gguf`."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf", "Reading quantised GGUF files") from error
    return gguf


@dataclass(frozen=True)
class GgufCodes(RowCodes):
    """A tensor of a GGUF file; rows are stored one after another, each in whole blocks."""

    stored: TensorEntry  # its bytes, or its numbers where they are no codes
    type: int  # GGML's
    row_bytes: int
    turned: int = 0  # heads whose rows are in llama.cpp's order; 0 where they are transformers'
    minus: float = 0.0

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return what else decides the values."""
        return (self.type, self.turned, self.minus)

    def rows(self, read: Read, first: int, last: int) -> Tensor:
        """Return rows [first, last), in the entry's dtype."""
        if not self.turned:
            return self._rows(read, first, last)
        # Rows h·2d + 2i + s of the file are h·2d + s·d + i of transformers (s = 0, 1).
        size = (self.entry.shape[0] if self.entry.shape else 1) // self.turned
        low = first // size * size
        high = -(-last // size) * size
        block = self._rows(read, low, high)
        width = block.shape[1:]
        order = block.reshape(-1, size // 2, 2, *width).transpose(1, 2)
        return order.reshape(-1, *width)[first - low : last - low].contiguous()

    def _rows(self, read: Read, first: int, last: int) -> Tensor:
        if self.type in PLAIN:
            flat = read(self.stored.name, first * self.width, last * self.width)
            values = flat.view(last - first, self.width)
        else:
            raw = read(self.stored.name, first * self.row_bytes, last * self.row_bytes)
            gguf = library()
            blocks = raw.numpy().reshape(last - first, self.row_bytes)
            numbers = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(self.type))
            values = torch.from_numpy(numbers)
        if self.minus:
            values = values.to(self.entry.dtype) - self.minus
        return values.to(self.entry.dtype)


@dataclass(frozen=True)
class GgufTable:
    """What a GGUF file holds: its tensors as they lie there, and what they mean."""

    entries: tuple[TensorEntry, ...]  # as stored
    codes: Mapping[str, Codes]  # name in transformers -> how it is computed
    config: Mapping[str, Any]
    kinds: Mapping[str, int]  # type -> number of tensors
    # settings of its tokenizer, such as `tokens` by row and their `token_type`
    tokenizer: Mapping[str, Any] = field(default_factory=dict[str, Any])


def table_of(header: GgufHeader, path: Path, file: str) -> GgufTable:
    """Return the tensors of a GGUF file under the names of transformers.

    Numbers that are codes become float32. CheckpointError where a tensor's name is not known, so
    that nothing is left out in silence.
    """
    architecture = architecture_of(header, path)
    entries: list[TensorEntry] = []
    codes: dict[str, Codes] = {}
    kinds: Counter[str] = Counter()
    unknown: list[str] = []
    for tensor in header.tensors:
        if is_gguf_buffer(tensor.name):
            continue
        known = named_in_transformers(tensor.name, architecture)
        if known is None:
            unknown.append(tensor.name)
            continue
        _, _, label = block_of(tensor.type)
        if label:
            kinds[f"GGUF {label}"] += 1
        for name, part in _split(tensor, known.name):
            stored = _stored(part, file)
            entries.append(stored)
            codes[name] = _codes(name, known.kind, part, stored, header, architecture)
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} tensors have names that are not known, such as '{unknown[0]}'."
            "\nName the checkpoint that it was made from."
        )
    tied = not any(name.startswith("lm_head") for name in codes)
    config = config_of(header, architecture, tied)
    begin = "tokenizer.ggml."
    own = {k.removeprefix(begin): v for k, v in header.settings.items() if k.startswith(begin)}
    tokenizer = own if isinstance(own.get("tokens"), list) else {}
    return GgufTable(tuple(entries), codes, config, dict(kinds), tokenizer)


def joined(tables: Sequence[GgufTable]) -> GgufTable:
    """Return the table of a model in several files."""
    if len(tables) == 1:
        return tables[0]
    codes: dict[str, Codes] = {}
    kinds: Counter[str] = Counter()
    for table in tables:
        codes.update(table.codes)
        kinds.update(table.kinds)
    tied = not any(name.startswith("lm_head") for name in codes)
    config = {**tables[0].config, "tie_word_embeddings": tied}
    sizes = [t.config["vocab_size"] for t in tables if "vocab_size" in t.config]
    if sizes:
        config["vocab_size"] = sizes[0]
    entries = tuple(entry for table in tables for entry in table.entries)
    return GgufTable(entries, codes, config, dict(kinds), tables[0].tokenizer)


def _split(tensor: GgufTensor, name: str) -> list[tuple[str, GgufTensor]]:
    """Return the tensors that a stack of experts is made of, or the tensor itself."""
    if "{expert}" not in name or not tensor.shape:
        return [(name, tensor)]
    count = tensor.shape[0]
    size = tensor.nbytes // max(count, 1)
    return [
        (
            name.format(expert=number),
            GgufTensor(
                f"{tensor.name}[{number}]",
                tensor.shape[1:],
                tensor.type,
                tensor.offset + number * size,
                size,
            ),
        )
        for number in range(count)
    ]


def _stored(tensor: GgufTensor, file: str) -> TensorEntry:
    plain = _PLAIN_DTYPES.get(tensor.type)
    shape = tensor.shape if plain is not None else (tensor.nbytes,)
    name = f"gguf:{tensor.name}"
    return TensorEntry(name, plain or torch.uint8, shape, file, tensor.offset, tensor.nbytes)


def _codes(
    name: str,
    kind: str,
    tensor: GgufTensor,
    stored: TensorEntry,
    header: GgufHeader,
    architecture: Architecture,
) -> Codes:
    dtype = _PLAIN_DTYPES.get(tensor.type, torch.float32)
    shape = tensor.shape
    if kind == "ffn_gate_inp_shexp" and len(shape) == 1:  # kept as a vector
        shape = (1, *shape)
    entry = replace(stored, name=name, dtype=dtype, shape=shape)
    rows = max(1, entry.numel // max(shape[-1] if shape else 1, 1))
    label, parts = block_of(tensor.type)[2] or "GGUF", (stored.name,)
    minus = 1.0 if architecture.norm_plus_one and is_norm_of_gguf(kind) else 0.0
    turned = 0
    if architecture.turned and kind in ("attn_q", "attn_k"):
        heads = header.setting("attention.head_count")
        own = header.setting("attention.head_count_kv", heads) if kind == "attn_k" else heads
        if not isinstance(own, int) or own < 1 or shape[0] % (2 * own):
            raise CheckpointError(
                f"'{tensor.name}' {list(shape)} does not belong to {own!r} attention heads."
            )
        turned = own
        if len(shape) == 1:  # a bias: every number is a row
            entry = replace(entry, shape=(*shape, 1))
    size = tensor.nbytes // rows if not (turned and len(shape) == 1) else stored.dtype.itemsize
    found = GgufCodes(label, entry, stored.name, parts, stored, tensor.type, size, turned, minus)
    if turned and len(shape) == 1:
        return Flat(label, replace(entry, shape=shape), stored.name, parts, found)
    if kind in architecture.transposed and len(shape) == 2 and name.endswith("weight"):
        return Transposed(label, replace(entry, shape=shape[::-1]), stored.name, parts, found)
    return found


@dataclass(frozen=True)
class Flat(Codes):
    """Codes of rows of one number, as a vector."""

    inner: Codes

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return the inner's."""
        return self.inner.settings

    def decode(self, read: Read, start: int, stop: int) -> Tensor:
        """Return elements [start, stop), 1-D, in the entry's dtype."""
        return self.inner.decode(read, start, stop)
