"""The layout of an output: which files, which tensors in them, in which order."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from eutectic.checkpoint.index import PICKLE_SUFFIXES, CheckpointIndex

SINGLE_NAME = "model.safetensors"
SHARD_INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file to be written.

    Attributes:
        name: file name in the output folder.
        entries: (tensor name, dtype, shape), in order.
        metadata: its `__metadata__`.
    """

    name: str
    entries: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, without the header."""
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.entries)


def layout_like(
    index: CheckpointIndex,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    drop: Container[str] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> list[OutputFile]:
    """Return output files laid out as those of `index`.

    The same shards hold the same tensors in the same order. Torch pickles become safetensors
    under the names transformers uses. A shard of which nothing is left is omitted.

    Args:
        index: the checkpoint to imitate.
        dtype: type of the floating-point tensors (default: each keeps its own); others keep theirs.
        metadata: added to each file's own `__metadata__`; "format" is always "pt".
        drop: tensors to leave out.
        shapes: tensors whose shape differs from that in `index`.
    """
    held: dict[str, list[tuple[str, torch.dtype, tuple[int, ...]]]] = {f: [] for f in index.files}
    for entry in index.entries.values():
        if entry.name in drop:
            continue
        shape = (shapes or {}).get(entry.name, entry.shape)
        stored = dtype if dtype and entry.dtype.is_floating_point else entry.dtype
        held[entry.file].append((entry.name, stored, shape))
    files = [file for file in index.files if held[file]]
    names = _output_names(files)
    return [
        OutputFile(
            names[file],
            tuple(held[file]),
            {**index.metadata.get(file, {}), **(metadata or {}), "format": "pt"},
        )
        for file in files
    ]


def weight_index_name(index: CheckpointIndex) -> str | None:
    """Return the name of the output's weight index when laid out like `index`; None if unsharded.

    One that stands for pickles gets the name that transformers uses for safetensors.
    """
    if index.weight_index is None:
        return None
    stem = index.weight_index.removesuffix(".index.json")
    return index.weight_index if stem.endswith(".safetensors") else SHARD_INDEX_NAME


def weight_index_bytes(files: Sequence[OutputFile]) -> bytes:
    """Return the content of the `*.index.json` file for sharded output."""
    weight_map = {name: file.name for file in files for name, _, _ in file.entries}
    table = {
        "metadata": {"total_size": sum(file.data_bytes for file in files)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _output_names(files: Sequence[str]) -> dict[str, str]:
    if not any(file.endswith(PICKLE_SUFFIXES) for file in files):
        return {file: file for file in files}
    if len(files) == 1:
        return {files[0]: SINGLE_NAME}
    count = len(files)
    return {
        file: f"model-{i:05d}-of-{count:05d}.safetensors" for i, file in enumerate(files, start=1)
    }
