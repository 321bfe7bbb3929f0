"""Which files an output consists of, and which tensors they hold, in which order."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

SINGLE_NAME = "model.safetensors"
SHARD_INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an output; `file` is the base's that holds its like, None if there is none."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file to be written: its (tensor name, dtype, shape), and `__metadata__`."""

    name: str
    entries: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, without the header."""
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.entries)


def output_file(
    name: str, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]
) -> OutputFile:
    """Return a file of these tensors; "format" in its metadata is always "pt"."""
    entries = tuple((t.name, t.dtype, t.shape) for t in tensors)
    return OutputFile(name, entries, {**metadata, "format": "pt"})


def shard_name(position: int, count: int) -> str:
    """Return the name of a shard as transformers writes it; `position` starts at 1."""
    return f"model-{position:05d}-of-{count:05d}.safetensors"


def weight_index_bytes(files: Sequence[OutputFile]) -> bytes:
    """Return the content of the `*.index.json` file for sharded output."""
    weight_map = {name: file.name for file in files for name, _, _ in file.entries}
    table = {
        "metadata": {"total_size": sum(file.data_bytes for file in files)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
