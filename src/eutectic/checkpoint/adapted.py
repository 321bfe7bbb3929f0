"""A checkpoint with a LoRA adapter merged into it, as a checkpoint like any other.

W + scaling·B·A is formed range by range, in float32 (float64 where W is); nothing is rounded to the
checkpoint's dtype and nothing is written to the disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from eutectic.checkpoint.expert_tensors import Expert
from eutectic.checkpoint.experts import is_adapter, open_expert
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.opening import open_reader
from eutectic.checkpoint.reader import CheckpointSource
from eutectic.errors import CheckpointError


class Adapted:
    """A checkpoint's tensors with an adapter's changes; safe to share between threads."""

    is_delta = False

    def __init__(self, source: CheckpointSource, adapter: Expert) -> None:
        """Show `source` with the changes of `adapter`, which was opened against it."""
        if adapter.extra:
            raise CheckpointError(
                f"{adapter.label}: brings tensors that its model lacks, such as "
                f"'{next(iter(adapter.extra))}'.\nMerge it with peft (merge_and_unload) and name "
                "the result."
            )
        self.source, self.adapter = source, adapter
        self.notes = source.notes
        self.changed = {*adapter.entries}
        entries: dict[str, TensorEntry] = {}
        for name, entry in source.entries.items():
            if name in self.changed:
                shape = adapter.entries[name].shape
                entry = replace(entry, dtype=_wide(entry.dtype), shape=shape, offset=-1)
                entry = replace(entry, nbytes=entry.numel * entry.dtype.itemsize)
            entries[name] = entry
        self.entries: Mapping[str, TensorEntry] = entries
        self.index = replace(source.index, entries=source.entries)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor, as `CheckpointReader.read`."""
        if name not in self.changed:
            return self.source.read(name, start, stop)
        stored, dtype = self.source.entries[name], self.entries[name].dtype
        if stored.shape != self.entries[name].shape:  # resized: it replaces the checkpoint's
            return self.adapter.read(name, start, stop).to(dtype)
        base = self.source.read(name, start, stop).to(dtype)
        return self.adapter.weight(name, start, stop, base=base, dtype=dtype)

    def fingerprint(self) -> str:
        """Return the sampled identity of both."""
        both = self.source.fingerprint() + self.adapter.fingerprint()
        return hashlib.sha256(both.encode()).hexdigest()

    def identity(self) -> list[tuple[str, int, int]]:
        """Return (file, bytes, mtime in ns) of every file read."""
        return [*self.source.identity(), *self.adapter.identity()]

    def close(self) -> None:
        """Release files."""
        self.source.close()
        self.adapter.close()

    def __enter__(self) -> Adapted:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def open_adapted(path: Path, adapter: Path | None) -> CheckpointSource:
    """Return the reader of a checkpoint, with an adapter's changes if one is given."""
    reader = open_reader(path)
    if adapter is None:
        return reader
    try:
        if not is_adapter(adapter):
            raise CheckpointError(f"{adapter}: is no adapter: it holds no adapter_config.json.")
        return Adapted(reader, open_expert(adapter, reader.index))
    except BaseException:
        reader.close()
        raise
