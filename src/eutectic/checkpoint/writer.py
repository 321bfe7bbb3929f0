"""Writing safetensors files whose layout is fixed before any value is known."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.header import TensorEntry, build_header
from eutectic.checkpoint.names import check_plain_name
from eutectic.errors import OutputError, RequestError, ResumeError, why_failed
from eutectic.storage import StagedFile, storage_of, url_of, view
from eutectic.storage.small_files import parse_json


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file to be written: its (tensor name, dtype, shape), and `__metadata__`."""

    name: str  # relative to the folder of the output
    entries: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""  # of the names of all its tensors; their keys in the file lack it

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of its tensors in the file."""
        return tuple(name.removeprefix(self.prefix) for name, _, _ in self.entries)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, without the header."""
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.entries)


class CheckpointWriter:
    """Writes the tensors of one folder at fixed offsets; safe to share between threads.

    All files get their headers and their final size at once, so that a disk that is too small
    fails before the work begins, and the bytes do not depend on the order of writing. The caller
    writes into a folder that does not look finished, and renames it at the end.
    """

    def __init__(self, folder: Path, files: Sequence[OutputFile], resume: bool = False) -> None:
        """Lay out `files` in `folder`, which is created if need be.

        With `resume`, files that exist are taken up; ResumeError where headers or sizes differ.
        """
        self.folder = Path(folder)
        self.files = tuple(files)
        # Files whose headers this object wrote: on resuming, those a previous run had not come to.
        self.laid_out: tuple[str, ...] = ()
        self._storage = storage_of(self.folder)
        self._staged: dict[str, StagedFile] = {}
        self._where: dict[str, TensorEntry] = {}
        headers: dict[str, bytes] = {}
        for file in self.files:
            for part in file.name.split("/"):
                check_plain_name(part, "the output")
            rows = [(k, *row[1:]) for k, row in zip(file.keys, file.entries, strict=True)]
            headers[file.name], placed = build_header(rows, file.metadata, file.name)
            for tensor in placed:
                name = file.prefix + tensor.name
                if name in self._where:
                    raise ValueError(f"tensor '{name}' occurs in two output files")
                self._where[name] = tensor
        sizes = {file.name: len(headers[file.name]) + file.data_bytes for file in self.files}
        try:
            pending = [n for n in sizes if not (resume and self._take_up(n, headers[n], sizes[n]))]
            # Asked before reserving: some file systems take what there is before they find it too
            # little, and other programs would meet a full disk meanwhile.
            free = self._storage.free_bytes(self.folder)
            if free is not None and sum(sizes[name] for name in pending) > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for name in pending:
                staged = self._storage.stage(self.folder / name, sizes[name], fresh=not resume)
                self._staged[name] = staged
                self.laid_out = (*self.laid_out, name)
                # The header comes last: a file that has one has its final size.
                staged.write(memoryview(headers[name]), 0)
        except OSError as error:
            self.close()
            for name in self.laid_out:  # gives back their space
                self._storage.remove(self.folder / name)
            raise self._failure(error, sum(sizes.values())) from error
        except ResumeError:
            self.close()
            raise

    @property
    def reopening(self) -> Callable[[], CheckpointWriter] | None:
        """What takes up the same files in another process; None where they go to a store.

        Such files lie in a folder of this machine until they are complete.
        """
        if url_of(self.folder) is not None:
            return None
        return partial(_taken_up, self.folder.absolute(), self.files)

    def write(self, name: str, start: int, values: Tensor) -> Tensor:
        """Write `values` over elements [start, start + n) of the flattened tensor `name`.

        Any order, any thread; ranges written at the same time must not overlap. What is in the
        file now is returned, as bytes.
        """
        tensor = self._where[name]
        if values.dtype != tensor.dtype:
            raise ValueError(f"'{name}' is laid out as {tensor.dtype}, got {values.dtype}")
        width = tensor.dtype.itemsize
        if start < 0 or (start + values.numel()) * width > tensor.nbytes:
            raise ValueError(f"'{name}': {values.numel()} values at {start} lie outside of it")
        flat = values.detach().reshape(-1).contiguous().cpu().view(torch.uint8)
        try:
            self._staged[tensor.file].write(flat.numpy().data, tensor.offset + start * width)
        except OSError as error:
            raise self._failure(error, tensor.nbytes, tensor.file) from error
        return flat

    def read_back(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor as they are in the file, 1-D."""
        tensor = self._where[name]
        width = tensor.dtype.itemsize
        stop = tensor.nbytes // width if stop is None else stop
        buffer = torch.empty((stop - start) * width, dtype=torch.uint8)
        try:
            self._staged[tensor.file].read_into(buffer.numpy().data, tensor.offset + start * width)
        except OSError as error:
            raise self._failure(error, tensor.nbytes, tensor.file) from error
        return buffer.view(tensor.dtype)

    def sync(self) -> None:
        """Force all that was written into the storage; a delayed write may find it full."""
        file = ""
        try:
            for name, staged in self._staged.items():
                file = name
                staged.sync()
        except OSError as error:
            raise self._failure(error, 0, file) from error

    def close(self) -> None:
        """Close all files; not a substitute for `sync`."""
        while self._staged:
            self._staged.popitem()[1].close()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_up(self, name: str, header: bytes, size: int) -> bool:
        """Open an existing file; False when a previous run had not finished laying it out."""
        path = self.folder / name
        staged = self._storage.staged(path)
        if staged is None:
            return False
        start = bytearray(min(len(header), staged.size))
        staged.read_into(memoryview(start), 0)
        found = bytes(start)
        # What a kill left of the header, which is the first thing that is written.
        torn = len(found.rstrip(b"\0"))
        if torn < len(header) and found == header[:torn].ljust(len(found), b"\0"):
            staged.close()
            return False
        self._staged[name] = staged
        if found != header or staged.size != size:
            length = f"{staged.size:,} bytes instead of {size:,}"
            what = length if found == header else "another header"
            raise ResumeError(
                f"{path}: cannot be continued, it has {what}.\n"
                f"It belongs to another request or was damaged; remove {self.folder} to start anew."
            )
        return True

    def _failure(self, error: OSError, needed: int, file: str = "") -> OutputError:
        if error.errno in (errno.ESTALE, errno.EIO):
            return OutputError(
                f"{self.folder / file}: {why_failed(error)}.\nNothing has been put in place. Run "
                "the same command again; what cannot be continued is named then."
            )
        if error.errno == errno.EFBIG:
            return OutputError(
                f"{self.folder}: {why_failed(error)}.\nLift the limit, or let shard_size make "
                "smaller files, then run the same command again."
            )
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            free = self._storage.free_bytes(self.folder) or 0
            return OutputError(
                f"{self.folder}: {why_failed(error)}.\n"
                f"Needed: {needed:,} bytes; free: {free:,} bytes.\n"
                "Make room or choose another output folder, then run the same command again."
            )
        where = error.filename or self.folder
        return OutputError(f"{where}: cannot be written ({why_failed(error)}).")


def _taken_up(folder: Path, files: Sequence[OutputFile]) -> CheckpointWriter:
    """Open files that another process has laid out; OutputError where they are not seen."""
    storage = storage_of(folder)
    missing = [file.name for file in files if storage.identity(folder / file.name) is None]
    if missing:  # laying them out anew would write where nobody looks
        raise unseen_output(folder / missing[0])
    return CheckpointWriter(folder, files, resume=True)


def unseen_output(location: Path) -> OutputError:
    """Return the error of a worker that does not see where the output is written."""
    return OutputError(
        f"{location} is not there.\nEvery machine that takes part must see the output's folder "
        "under the same path: use a shared file system."
    )


class MemoryWriter:
    """Tensors in memory with the surface of `CheckpointWriter`."""

    reopening = None

    def __init__(self, entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        self.tensors = {name: torch.empty(shape, dtype=dtype) for name, dtype, shape in entries}

    def write(self, name: str, start: int, values: Tensor) -> Tensor:
        """Write `values` over elements [start, start + n) of the flattened tensor `name`."""
        self.tensors[name].view(-1)[start : start + values.numel()] = values
        return values

    def read_back(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor, 1-D."""
        return self.tensors[name].view(-1)[start:stop]

    def sync(self) -> None:
        """Do nothing: it is there."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that it is either absent (or as before) or complete, on disk."""
    try:
        with storage_of(path).replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({why_failed(error)}).") from error


def check_replaced(path: Path, keys: Set[str], what: str) -> None:
    """Find out before any work whether `what`, a JSON file, may be written there.

    It may replace an earlier file of the same kind, which has these keys.
    """
    view(path)
    odd = path.exists() and not path.is_file()
    if odd or (path.is_file() and path.stat().st_size and not _has_keys(path, keys)):
        kind = "holds something else"
        if odd:
            kind = "is a folder" if path.is_dir() else "is a pipe or a device, no regular file"
        raise RequestError(
            f"{path}: {what} would be written there, and it {kind}.\nChoose another name."
        )


def _has_keys(path: Path, keys: Set[str]) -> bool:
    try:
        with path.open("rb") as file:
            if file.read(1) != b"{":  # it may be a checkpoint of many gigabytes
                return False
            found: Any = parse_json(b"{" + file.read())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and keys <= found.keys()
