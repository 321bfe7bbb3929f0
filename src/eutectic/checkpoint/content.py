"""A cheap identity of a checkpoint's content, independent of its layout on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from eutectic.checkpoint.index import TensorEntry

_WINDOW_BYTES = 4096


class TensorSource(Protocol):
    """A table of tensors and a way to read flat ranges of them; files and memory look alike."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Tensors by name."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of the flattened tensor, in memory of their own."""
        ...

    def fingerprint(self) -> str:
        """Return the sampled identity of the content."""
        ...

    def identity(self) -> list[tuple[str, int, int]]:
        """Return (file, bytes, mtime in ns) of every file read; empty in memory."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


def sampled_fingerprint(source: TensorSource, names: Iterable[str] | None = None) -> str:
    """Return a SHA-256 over names, types, shapes and samples of the data.

    Up to three windows of 4 KiB (start, middle, end) of every tensor are hashed, in the order of
    names: two checkpoints with equal fingerprints are the same for every practical purpose, but an
    edit confined to the unsampled inside of a tensor goes unseen. Sharding, file format and
    order do not matter. Cost: three small reads per tensor.
    """
    digest = hashlib.sha256()
    for name in sorted(source.entries if names is None else names):
        entry = source.entries[name]
        digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\0".encode())
        for start, stop in _windows(entry.numel, _WINDOW_BYTES // entry.dtype.itemsize):
            digest.update(source.read(name, start, stop).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _windows(count: int, width: int) -> list[tuple[int, int]]:
    if count <= 3 * width:
        return [(0, count)]
    middle = (count - width) // 2
    return [(0, width), (middle, middle + width), (count - width, count)]
