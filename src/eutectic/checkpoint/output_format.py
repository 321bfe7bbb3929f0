"""How the tensors of an output become files: laid out like the base, or in shards of a size."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from eutectic.checkpoint.gguf_file import SUFFIX as GGUF_SUFFIX
from eutectic.checkpoint.index import PICKLE_SUFFIXES, CheckpointIndex
from eutectic.checkpoint.module_folders import ModuleFolder
from eutectic.checkpoint.writer import CheckpointWriter, OutputFile, write_atomically

SINGLE_NAME = "model.safetensors"
SHARD_INDEX_NAME = "model.safetensors.index.json"
# Pickles whose loader looks for safetensors under a name of its own (open_clip's constants.py).
_SAFE_NAMES = {
    f"open_clip_pytorch_model{end}": "open_clip_model.safetensors" for end in PICKLE_SUFFIXES
}


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

    def sync(self) -> None:
        """Force all that was written into the storage."""


class TensorFiles(TensorSink, Protocol):
    """Files that are being filled."""

    @property
    def laid_out(self) -> tuple[str, ...]:
        """The files that were not there when these were opened, and have been made."""
        ...


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
        """Write what makes one model of the files in each folder; may be repeated after a kill."""
        for place, own in in_folders(files, lambda file: file.name).items():
            name = self._index_name(place, own)
            if name is not None:
                write_atomically(folder / place / name, weight_index_bytes(own))

    def _index_name(self, place: str, files: Sequence[OutputFile]) -> str | None:
        """Return the name of the index of the files in a folder, None where they need none."""
        return SHARD_INDEX_NAME if len(files) > 1 else None


@dataclass(frozen=True)
class LaidOutLikeBase(OutputFormat):
    """The same files as the base's, which hold the same tensors in the same order.

    Torch pickles become safetensors under the names that the base's loader looks for. A file of
    which nothing is left is omitted; tensors that the base lacks go to the end of the last file of
    their module. What a file of the base says of itself is kept.
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
        for tensor in tensors:
            if tensor.file is None:
                held[self._last(files, tensor.name)].append(tensor)
        own = self.index.metadata
        return [
            _output_file(
                name,
                held[file],
                {**own.get(file, {}), **metadata},
                self.index.module_of(file).prefix,
            )
            for file, name in self._names(files).items()
        ]

    def _last(self, files: Sequence[str], name: str) -> str:
        """Return the last file of the module that a tensor's name belongs to."""
        prefixes = {file: self.index.module_of(file).prefix for file in files}
        return max(reversed(files), key=lambda f: (name.startswith(prefixes[f]), len(prefixes[f])))

    def _names(self, files: Sequence[str]) -> dict[str, str]:
        """Return weight file of the base -> name of the safetensors file in its place."""
        names = {file: file for file in files}
        for place, own in in_folders(files, str).items():
            if any(file.endswith((*PICKLE_SUFFIXES, GGUF_SUFFIX)) for file in own):
                for i, file in enumerate(own, start=1):
                    single = _SAFE_NAMES.get(file.rpartition("/")[2], SINGLE_NAME)
                    name = single if len(own) == 1 else shard_name(i, len(own))
                    names[file] = f"{place}/{name}" if place else name
        return names

    def _index_name(self, place: str, files: Sequence[OutputFile]) -> str | None:
        name = self.index.module_of(files[0].name).weight_index
        if name is None:  # one file, or shards that no index lists
            return super()._index_name(place, files)
        name = name.rpartition("/")[2]
        safe = name.removesuffix(".index.json").endswith(".safetensors")
        return name if safe else SHARD_INDEX_NAME  # the base's may stand for pickles


@dataclass(frozen=True)
class InShards(OutputFormat):
    """Files of at most `shard_bytes` of tensors each, in the order of the tensors.

    A larger tensor has a file of its own. All in one file, without an index, where it fits. A
    module that lies in a folder of its own has files there, and one only where nothing but
    transformers reads shards.
    """

    shard_bytes: int
    index: CheckpointIndex | None = None  # of the base, which may lie in several folders

    def lay_out(
        self, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]
    ) -> list[OutputFile]:
        """Fill one shard after another."""
        files: list[OutputFile] = []
        for module, own in self._by_module(tensors).items():
            shards: list[list[OutputTensor]] = []
            room = 0
            for tensor in own:
                if not shards or (tensor.nbytes > room and module.transformer):
                    shards.append([])
                    room = self.shard_bytes
                shards[-1].append(tensor)
                room -= tensor.nbytes
            count = len(shards)
            names = (
                [SINGLE_NAME] if count == 1 else [shard_name(i + 1, count) for i in range(count)]
            )
            files += [
                _output_file(module.file(name), held, metadata, module.prefix)
                for name, held in zip(names, shards, strict=True)
            ]
        return files

    def _by_module(
        self, tensors: Sequence[OutputTensor]
    ) -> Mapping[ModuleFolder, list[OutputTensor]]:
        alone = ModuleFolder("", "", transformer=True)
        if self.index is None or not self.index.modules:
            return {alone: list(tensors)}
        found: dict[ModuleFolder, list[OutputTensor]] = {}
        for tensor in tensors:
            module = self.index.main if tensor.file is None else self.index.module_of(tensor.file)
            found.setdefault(module, []).append(tensor)
        return found


def in_folders(files: Sequence[Any], name_of: Callable[[Any], str]) -> dict[str, list[Any]]:
    """Return folder -> the files in it, by their names."""
    found: dict[str, list[Any]] = {}
    for file in files:
        found.setdefault(name_of(file).rpartition("/")[0], []).append(file)
    return found


def _output_file(
    name: str, tensors: Sequence[OutputTensor], metadata: Mapping[str, str], prefix: str = ""
) -> OutputFile:
    """Return a file of these tensors; "format" in its metadata is always "pt"."""
    entries = tuple((t.name, t.dtype, t.shape) for t in tensors)
    return OutputFile(name, entries, {**metadata, "format": "pt"}, prefix)


def shard_name(position: int, count: int) -> str:
    """Return the name of a shard as transformers writes it; `position` starts at 1."""
    return f"model-{position:05d}-of-{count:05d}.safetensors"


def weight_index_bytes(files: Sequence[OutputFile]) -> bytes:
    """Return the content of the `*.index.json` file for sharded output."""
    weight_map = {key: file.name.rpartition("/")[2] for file in files for key in file.keys}
    table = {
        "metadata": {"total_size": sum(file.data_bytes for file in files)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
