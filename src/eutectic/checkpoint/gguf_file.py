"""The header of a GGUF file, as llama.cpp writes it, read within bounds.

A file is "GGUF", a version (2 or 3), the numbers of tensors and of settings, the settings, the
tensors' names, sizes, types and places, and from the next multiple of the alignment on the data.
Strings and lists carry their lengths; every one is checked against what is left of the file.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from eutectic.errors import CheckpointError
from eutectic.storage.small_files import open_regular

MAGIC = b"GGUF"
SUFFIX = ".gguf"
_MOST_SETTINGS = 100_000
_MOST_TENSORS = 1_000_000
_MOST_ITEMS = 4 << 20  # of one list: tokens, merges
_MOST_TEXT = 16 << 20  # bytes of one text
_MOST_HEADER = 1 << 30
# Types of settings -> how struct calls them.
_NUMBERS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f"},
    **{7: "<?", 10: "<Q", 11: "<q", 12: "<d"},
}
_TEXT, _LIST = 8, 9
# Types of tensors whose numbers are no codes: GGML's number -> bytes.
PLAIN = {0: 4, 1: 2, 28: 8, 30: 2}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as a GGUF file holds it."""

    name: str
    shape: tuple[int, ...]  # the last dimension is the one that lies in a row
    type: int  # GGML's
    offset: int  # in the file
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself."""

    settings: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    def setting(self, name: str, default: Any = None) -> Any:
        """Return a setting of the architecture (`block_count`), or of that name."""
        own = f"{self.settings.get('general.architecture')}.{name}"
        return self.settings.get(own, self.settings.get(name, default))


def looks_like_gguf(path: Path) -> bool:
    """Tell whether a file begins as GGUF files do."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def block_of(type_number: int) -> tuple[int, int, str]:
    """Return (numbers in a block, bytes of a block, name) of a type; CheckpointError for others."""
    from eutectic.checkpoint.quantised.gguf import library

    if type_number in PLAIN:
        return 1, PLAIN[type_number], ""
    gguf = library()
    try:
        kind = gguf.GGMLQuantizationType(type_number)
        count, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise CheckpointError(f"tensors of an unknown type ({type_number})") from None
    return int(count), int(size), str(kind.name)


def read_gguf(path: Path) -> GgufHeader:
    """Return the header of a GGUF file; CheckpointError where it lies or ends early."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return _Reader(file, os.fstat(file.fileno()).st_size).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (_Broken, CheckpointError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: no readable GGUF file: {error}.\nDownload it again, or name the checkpoint "
            "that it was made from."
        ) from None


class _Broken(ValueError):
    """Why a file cannot be read."""


class _Reader:
    """Reads a header from its start to its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def header(self) -> GgufHeader:
        if self._take(4) != MAGIC:
            raise _Broken("it does not begin with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise _Broken(f"version {version}, known are 2 and 3")
        tensors, settings = self._number("<Q"), self._number("<Q")
        if tensors > _MOST_TENSORS or settings > _MOST_SETTINGS:
            raise _Broken(f"it announces {tensors:,} tensors and {settings:,} settings")
        known: dict[str, Any] = {}
        for _ in range(settings):
            name = self._text()
            known[name] = self._value(self._number("<I"), 0)
        listed = [self._tensor() for _ in range(tensors)]
        alignment = known.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise _Broken(f"an alignment of {alignment!r}")
        start = -(-self._file.tell() // alignment) * alignment
        found: list[GgufTensor] = []
        names: set[str] = set()
        for name, shape, kind, offset in listed:
            count, size, _ = block_of(kind)
            width = shape[-1] if shape else 1
            if width % count:
                raise _Broken(f"'{name}' has rows of {width:,} numbers, not of whole blocks")
            nbytes = math.prod(shape) // count * size
            if name in names:
                raise _Broken(f"two tensors are called '{name}'")
            if start + offset + nbytes > self._size:
                raise _Broken(f"'{name}' reaches beyond the end of the file")
            names.add(name)
            found.append(GgufTensor(name, shape, kind, start + offset, nbytes))
        return GgufHeader(known, tuple(found))

    def _take(self, count: int) -> bytes:
        if count > self._size - self._file.tell() or self._file.tell() > _MOST_HEADER:
            raise _Broken("it ends early")
        return self._file.read(count)

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _text(self) -> str:
        length = self._number("<Q")
        if length > _MOST_TEXT:
            raise _Broken(f"a text of {length:,} bytes")
        return self._take(length).decode("utf-8")

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _TEXT:
            return self._text()
        if kind != _LIST or depth > 3:
            raise _Broken(f"a setting of type {kind}")
        inner, count = self._number("<I"), self._number("<Q")
        if count > _MOST_ITEMS:
            raise _Broken(f"a list of {count:,} items")
        if inner in _NUMBERS:
            form = _NUMBERS[inner]
            size = struct.calcsize(form)
            return list(struct.unpack(f"<{count}{form[1]}", self._take(count * size)))
        return [self._value(inner, depth + 1) for _ in range(count)]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self._text(), self._number("<I")
        if axes > 4:
            raise _Broken(f"'{name}' has {axes} dimensions")
        shape = tuple(self._number("<Q") for _ in range(axes))[::-1]
        if math.prod(shape) >= 1 << 48:
            raise _Broken(f"'{name}' has the shape {list(shape)}")
        return name, shape, self._number("<I"), self._number("<Q")
