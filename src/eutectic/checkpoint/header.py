"""The header of a safetensors file: a strict parser and its inverse.

A file is `u64 length | JSON header | data`. The JSON maps tensor names to dtype, shape and byte
range in the data; the ranges follow one another without gap or overlap and end where the file ends.
"""

import hashlib
import json
import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eutectic.checkpoint.odd_files import HEAD_BYTES, by_content, start_of
from eutectic.errors import CheckpointError
from eutectic.storage import OpenedFile, storage_of
from eutectic.storage.small_files import INDEX_BYTES, parse_json
from eutectic.words import shown

MAX_HEADER_BYTES = INDEX_BYTES
MOST_AXES = 64  # of a tensor
METADATA_KEY = "__metadata__"
_MAX_DIMENSION = 2**63 - 1
_WHOLE = frozenset({int})  # no booleans

_CODES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
    **{"BOOL": "bool", "C64": "complex64"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
    **{"F8_E8M0": "float8_e8m0fnu"},
}
# Older versions of torch lack some of the 8-bit types.
DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name) for code, name in _CODES.items() if hasattr(torch, name)
}
CODE_OF: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str  # relative to the checkpoint's folder; "" in memory
    offset: int  # absolute, in bytes; −1 in memory, and where its numbers do not lie in a row
    nbytes: int  # of a tensor that an adapter changes: bytes of the factors

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself, tensors in the order of their bytes."""

    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]


def read_header(path: Path, file: str = "") -> Header:
    """Return the header of a safetensors file, `file` in its entries; no data are read.

    CheckpointError unless every byte range fits its tensor's shape, its neighbours and the file.
    """
    try:
        with closing(storage_of(path).open(path)) as opened:
            size = opened.size
            start = _bytes_of(opened, 0, min(size, HEAD_BYTES))
            length = int.from_bytes(start[:8], "little")
            if start[8:9] != b"{" and (other := by_content(path, start)) is not None:
                raise other.error(path)
            if size < 8:
                raise _cut_off(path, f"{size} bytes, too short for the length of a header")
            announced = f"it announces a header of {length:,} bytes"
            if length > MAX_HEADER_BYTES:
                limit = f"{announced}, the limit is {MAX_HEADER_BYTES:,}"
                raise _broken(path, f"not safetensors, or corrupt: {limit}")
            if 8 + length > size:
                raise _cut_off(path, f"{announced}, the file ends after {size:,}")
            raw = _bytes_of(opened, 8, length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    # Models that one program saved differ in their data alone: the same table is read once.
    key = (file, size, hashlib.sha256(raw).digest())
    header = _KNOWN.get(key)
    if header is None:
        header = _parse(path, file, raw, size)
        _KNOWN.keep(key, header)
    return header


class _Known:
    """The headers that were read last, by their bytes; of `_MOST_KEPT` tensors together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._headers: OrderedDict[tuple[str, int, bytes], Header] = OrderedDict()
        self._tensors = 0

    def get(self, key: tuple[str, int, bytes]) -> Header | None:
        with self._lock:
            if key in self._headers:
                self._headers.move_to_end(key)
            return self._headers.get(key)

    def keep(self, key: tuple[str, int, bytes], header: Header) -> None:
        with self._lock:
            if key in self._headers or len(header.tensors) > _MOST_KEPT:
                return
            self._headers[key] = header
            self._tensors += len(header.tensors)
            while self._tensors > _MOST_KEPT:
                self._tensors -= len(self._headers.popitem(last=False)[1].tensors)


_MOST_KEPT = 100_000
_KNOWN = _Known()


def looks_like_safetensors(path: Path) -> bool:
    """Tell whether a file begins as safetensors do, whatever its name is."""
    try:
        start = start_of(path)
        size = (storage_of(path).identity(path) or (0, 0))[0]
    except OSError:
        return False
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= min(size, MAX_HEADER_BYTES)


def _bytes_of(file: OpenedFile, offset: int, count: int) -> bytes:
    buffer = bytearray(count)
    file.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def _parse(path: Path, file: str, raw: bytes, file_size: int) -> Header:
    if not raw.startswith(b"{"):
        raise _broken(path, "not safetensors, or corrupt: the header does not begin with '{'")
    try:
        table = parse_json(raw, unique=True, deep=False)
    except ValueError as error:
        raise _broken(path, f"corrupt: the header is not valid JSON ({error})") from error
    metadata = table.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, f"corrupt: '{METADATA_KEY}' must map names to strings")
    position = 8 + len(raw)
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # most tensors share theirs
    tensors = [_tensor(path, file, name, item, position, shapes) for name, item in table.items()]
    del table
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    previous = "the header"
    for tensor in tensors:
        if tensor.offset != position:
            fault = "overlaps" if tensor.offset < position else "leaves a gap after"
            raise _broken(path, f"inconsistent header: tensor '{tensor.name}' {fault} {previous}")
        position += tensor.nbytes
        previous = f"'{tensor.name}'"
    if position > file_size:
        raise _cut_off(path, f"the file ends after {file_size:,} of {position:,} bytes")
    if position != file_size:
        described = f"it describes {position:,} bytes, the file has {file_size:,}"
        raise _broken(path, f"inconsistent header: {described}")
    return Header(tuple(tensors), metadata)


def _tensor(
    path: Path,
    file: str,
    name: str,
    item: Any,
    data_start: int,
    shapes: dict[tuple[int, ...], tuple[int, ...]],
) -> TensorEntry:
    def broken(what: str) -> CheckpointError:
        return _broken(path, f"inconsistent header: tensor '{name}': {what}")

    if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= item.keys():
        raise broken("it needs 'dtype', 'shape' and 'data_offsets'")
    code, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor '{name}' has the data type {shown(code)}, which is not supported.\n"
            f"Known types: {', '.join(DTYPES)}."
        )
    if not _is_size_list(shape):
        raise broken(f"shape {shown(shape)} is not a list of sizes ≥ 0, {MOST_AXES} at most")
    if not _is_size_list(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise broken(f"data_offsets {shown(offsets)} are not [begin, end] with 0 ≤ begin ≤ end")
    dtype = DTYPES[code]
    nbytes = offsets[1] - offsets[0]
    expected = math.prod(shape) * dtype.itemsize
    if nbytes != expected:
        raise broken(f"{code} of shape {shape} takes {expected:,} bytes, it claims {nbytes:,}")
    # Twenty experts have the same names.
    own = tuple(shape)
    size, offset = shapes.setdefault(own, own), data_start + offsets[0]
    return TensorEntry(sys.intern(name), dtype, size, file, offset, nbytes)


def _is_size_list(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MOST_AXES
        and _WHOLE.issuperset(map(type, value))
        and (not value or (min(value) >= 0 and max(value) <= _MAX_DIMENSION))
    )


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}.\nDownload or save the file again.")


def _cut_off(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: truncated: {what}.\nComplete the download, or save it again.")


def build_header(
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    file: str = "",
) -> tuple[bytes, tuple[TensorEntry, ...]]:
    """Return the header bytes of a file that holds `tensors`, and where each tensor lies.

    Tensors of wider types come first, otherwise the given order is kept: readers view the data in
    place and need every tensor aligned to its own item size. The header is padded with spaces so
    that the data start at a multiple of 8.
    """
    table: dict[str, Any] = {METADATA_KEY: dict(metadata)} if metadata else {}
    ordered = sorted(tensors, key=lambda t: -t[1].itemsize)
    ranges: list[list[int]] = []
    position = 0
    for name, dtype, shape in ordered:
        end = position + math.prod(shape) * dtype.itemsize
        ranges.append([position, end])
        table[name] = {"dtype": CODE_OF[dtype], "shape": list(shape), "data_offsets": ranges[-1]}
        position = end
    if len(table) != len(ordered) + bool(metadata):
        raise ValueError("a tensor name occurs twice in one file")
    raw = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    placed = tuple(
        TensorEntry(name, dtype, tuple(shape), file, 8 + len(raw) + begin, end - begin)
        for (name, dtype, shape), (begin, end) in zip(ordered, ranges, strict=True)
    )
    return len(raw).to_bytes(8, "little") + raw, placed
