"""How the tensors of an output become files: laid out like the base, or in shards of a size."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from eutectic.checkpoint.index import PICKLE_SUFFIXES, CheckpointIndex
from eutectic.checkpoint.writer import CheckpointWriter, OutputFile, write_atomically

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


class TensorSink(Protocol):
    """Where values of tensors go, in files or in memory; safe to share between threads."""

    @property
    def reopening(self) -> Callable[[], AbstractContextManager[TensorSink]] | None:
        """What opens the same in another process, picklable; None in memory."""

    def write(self, name: str, start: int, values: Tensor) -> Tensor:
        """Encode values and put them at elements [start, start + n) of a tensor, in any order.

        What was stored is returned; of it, finished tensors are hashed.
        """
        ...

    def read_back(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor as they are stored."""
        ...


class TensorFiles(TensorSink, Protocol):
    """Files that are being filled."""

    def sync(self) -> None:
        """Force all that was written into the storage."""


class OutputFormat(ABC):
    """How tensors become files: here, safetensors, and an index where there are several.

    A format of another kind overrides all methods; its dtypes and their encoding are its own.
    """

    @abstractmethod
    def lay_out(
        self, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]
    ) -> list[OutputFile]:
        """Return the files that hold these tensors, in the base's order; all say `metadata`."""

    def open(
        self, folder: Path, files: Sequence[OutputFile], *, resume: bool
    ) -> AbstractContextManager[TensorFiles]:
        """Create the files in a folder; with `resume`, take up those that are there."""
        return CheckpointWriter(folder, files, resume)

    def finish(self, folder: Path, files: Sequence[OutputFile]) -> None:
        """Write what makes one model of the files; may be repeated after a kill."""
        name = self._index_name(files)
        if name is not None:
            write_atomically(folder / name, weight_index_bytes(files))

    def _index_name(self, files: Sequence[OutputFile]) -> str | None:
        return SHARD_INDEX_NAME if len(files) > 1 else None


@dataclass(frozen=True)
class LaidOutLikeBase(OutputFormat):
    """The same files as the base's, which hold the same tensors in the same order.

    Torch pickles become safetensors under the names that transformers uses. A file of which nothing
    is left is omitted; tensors that the base lacks go to the end of the last file. What a file of
    the base says of itself is kept.
    """

    index: CheckpointIndex

    def lay_out(
        self, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]
    ) -> list[OutputFile]:
        """Return the base's files with these tensors."""
        held: dict[str, list[OutputTensor]] = {file: [] for file in self.index.files}
        for tensor in tensors:
            if tensor.file is not None:
                held[tensor.file].append(tensor)
        files = [file for file in held if held[file]] or [self.index.files[-1]]
        held[files[-1]] += [tensor for tensor in tensors if tensor.file is None]
        own = self.index.metadata
        return [
            _output_file(name, held[file], {**own.get(file, {}), **metadata})
            for file, name in _safetensors_names(files).items()
        ]

    def _index_name(self, files: Sequence[OutputFile]) -> str | None:
        name = self.index.weight_index
        if name is None or name.removesuffix(".index.json").endswith(".safetensors"):
            return name
        return SHARD_INDEX_NAME  # it stands for pickles


@dataclass(frozen=True)
class InShards(OutputFormat):
    """Files of at most `shard_bytes` of tensors each, in the order of the tensors.

    A larger tensor has a file of its own. All in one file, without an index, where it fits.
    """

    shard_bytes: int

    def lay_out(
        self, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]
    ) -> list[OutputFile]:
        """Fill one shard after another."""
        shards: list[list[OutputTensor]] = []
        room = 0
        for tensor in tensors:
            if not shards or tensor.nbytes > room:
                shards.append([])
                room = self.shard_bytes
            shards[-1].append(tensor)
            room -= tensor.nbytes
        count = len(shards)
        return [
            _output_file(SINGLE_NAME if count == 1 else shard_name(i, count), held, metadata)
            for i, held in enumerate(shards, start=1)
        ]


def _output_file(
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


def _safetensors_names(files: Sequence[str]) -> dict[str, str]:
    """Return weight file of the base -> name of the safetensors file in its place."""
    if not any(file.endswith(PICKLE_SUFFIXES) for file in files):
        return {file: file for file in files}
    if len(files) == 1:
        return {files[0]: SINGLE_NAME}
    return {file: shard_name(i, len(files)) for i, file in enumerate(files, start=1)}
