"""How the tensors of an output become files: laid out like the base, or in shards of a size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from eutectic.checkpoint.index import PICKLE_SUFFIXES, CheckpointIndex
from eutectic.checkpoint.layout import (
    SHARD_INDEX_NAME,
    SINGLE_NAME,
    OutputFile,
    OutputTensor,
    output_file,
    shard_name,
    weight_index_bytes,
)
from eutectic.checkpoint.writer import CheckpointWriter, write_atomically


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

    A format of another kind overrides all methods; which dtypes there are, and how they are
    encoded, is its own.
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
            output_file(name, held[file], {**own.get(file, {}), **metadata})
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
            output_file(SINGLE_NAME if count == 1 else shard_name(i, count), held, metadata)
            for i, held in enumerate(shards, start=1)
        ]


def output_format(index: CheckpointIndex, shard_bytes: int | None) -> OutputFormat:
    """Return how a merge is written: like the base, or with at most `shard_bytes` in a file."""
    return LaidOutLikeBase(index) if shard_bytes is None else InShards(shard_bytes)


def _safetensors_names(files: Sequence[str]) -> dict[str, str]:
    """Return weight file of the base -> name of the safetensors file in its place."""
    if not any(file.endswith(PICKLE_SUFFIXES) for file in files):
        return {file: file for file in files}
    if len(files) == 1:
        return {files[0]: SINGLE_NAME}
    return {file: shard_name(i, len(files)) for i, file in enumerate(files, start=1)}
