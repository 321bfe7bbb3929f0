"""Tensors and one JSON record in a safetensors file: written atomically, read one by one."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.header import build_header, read_header
from eutectic.errors import CheckpointError, OutputError, StatisticsError
from eutectic.storage import storage_of

Entry = tuple[str, torch.dtype, tuple[int, ...]]


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads a tensor when it is asked for.

    No file stays open between reads.
    """

    def __init__(self, path: Path, key: str) -> None:
        """Read the header, and the JSON record under `key` of its metadata."""
        self.path = path
        try:
            header = read_header(path)
        except CheckpointError as error:
            raise StatisticsError(str(error)) from error
        self._tensors = {t.name: t for t in header.tensors}
        self.record = _record(path, key, header.metadata)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        buffer = bytearray(tensor.nbytes)
        try:
            with closing(storage_of(self.path).open(self.path)) as file:
                file.read_into(memoryview(buffer), tensor.offset)
        except OSError as error:
            raise StatisticsError(
                f"{self.path}: cannot be read ({error.strerror or error})."
            ) from error
        if not buffer:
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return torch.frombuffer(buffer, dtype=tensor.dtype).reshape(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def nbytes(self, name: str) -> int:
        """Return the bytes of one tensor."""
        return self._tensors[name].nbytes

    def entries(self) -> list[Entry]:
        """Return name, dtype and shape of every tensor, in the order of the file."""
        return [(t.name, t.dtype, t.shape) for t in self._tensors.values()]


def _record(path: Path, key: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    if key not in metadata:
        raise StatisticsError(
            f"{path}: not a statistics file of eutectic ('{key}' is missing from its metadata).\n"
            "Collect one with: eutectic collect CHECKPOINT --data … -o FILE"
        )
    try:
        record = json.loads(metadata[key])
    except ValueError as error:
        raise StatisticsError(f"{path}: its record is not valid JSON ({error}).") from error
    if not isinstance(record, dict):
        raise StatisticsError(f"{path}: its record is not a JSON object.")
    return record


def entries_of(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Return name, dtype and shape of tensors, those of a file without reading them."""
    if isinstance(tensors, TensorFile):
        return tensors.entries()
    if isinstance(tensors, ChainMap):
        return sorted(entry for part in tensors.maps for entry in entries_of(part))
    return [(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in sorted(tensors)]


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], key: str, record: Mapping[str, Any]
) -> None:
    """Write a file that is either absent (or as before) or complete and on disk.

    One tensor at a time is asked for. The same tensors and record give the same bytes.
    """
    # One metadata key only: readers and writers of safetensors do not keep an order of keys.
    header, placed = build_header(entries_of(tensors), {key: json.dumps(record, sort_keys=True)})
    try:
        with storage_of(path).replacing(path) as file:
            file.write(header)
            for tensor in placed:
                value = tensors[tensor.name].detach().cpu().contiguous()
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}).\n"
            "Make room, or choose another place, then run the same command again."
        ) from error
