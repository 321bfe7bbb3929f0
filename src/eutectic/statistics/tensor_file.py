"""A safetensors file with a record: read tensor by tensor, written whole or not at all."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from eutectic.checkpoint.header import build_header, read_header
from eutectic.errors import CheckpointError, OutputError, StatisticsError, why_failed
from eutectic.storage import storage_of
from eutectic.storage.small_files import parse_json

Entry = tuple[str, torch.dtype, tuple[int, ...]]


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads a tensor when it is asked for.

    No file stays open between reads.
    """

    def __init__(self, path: Path, key: str) -> None:
        """Read the header, and the JSON record under `key` of its metadata."""
        try:
            header = read_header(path)
        except CheckpointError as error:
            raise StatisticsError(str(error)) from error
        if key not in header.metadata:
            raise StatisticsError(
                f"{path}: not a statistics file of eutectic ('{key}' is missing from its "
                "metadata).\nCollect one with: eutectic collect CHECKPOINT --data … -o FILE"
            )
        try:
            record = parse_json(header.metadata[key])
        except ValueError as error:
            raise StatisticsError(f"{path}: its record is not valid JSON ({error}).") from error
        if not isinstance(record, dict):
            raise StatisticsError(f"{path}: its record is not a JSON object.")
        self.path, self.record = path, cast("dict[str, Any]", record)
        self._tensors = {t.name: t for t in header.tensors}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        buffer = torch.empty(tensor.nbytes, dtype=torch.uint8)
        try:
            with closing(storage_of(self.path).open(self.path)) as file:
                file.read_into(buffer.numpy().data, tensor.offset)
        except OSError as error:
            raise StatisticsError(f"{self.path}: cannot be read ({why_failed(error)}).") from error
        return buffer.view(tensor.dtype).reshape(tensor.shape)

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
            f"{path}: cannot be written ({why_failed(error)}).\n"
            "Make room, or choose another place, then run the same command again."
        ) from error
