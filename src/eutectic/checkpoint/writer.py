"""Writing safetensors files whose layout is fixed before any value is known."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.header import HeaderTensor, build_header
from eutectic.checkpoint.layout import OutputFile
from eutectic.checkpoint.names import check_plain_name
from eutectic.checkpoint.reader import read_exactly
from eutectic.errors import OutputError, RequestError, ResumeError


class CheckpointWriter:
    """Writes the tensors of one folder at fixed offsets; safe to share between threads.

    All files get their headers and their final size at once, so that a disk that is too small
    fails before the work begins, and the bytes do not depend on the order of writing. The caller
    writes into a folder that does not look finished, and renames it at the end.

    Attributes:
        laid_out: names of the files whose headers were written by this object: all of them, or on
            resuming those that a previous run had not come to. They hold no finished tensors.
    """

    def __init__(self, folder: Path, files: Sequence[OutputFile], resume: bool = False) -> None:
        """Lay out `files` in `folder`, which is created if need be.

        Args:
            folder: output folder.
            files: what it shall hold.
            resume: take up files that exist already, after checking that their headers agree.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
            ResumeError: on resuming, a file has another header or size than expected.
        """
        self.folder = Path(folder)
        self.files = tuple(files)
        self.laid_out: tuple[str, ...] = ()
        self._descriptors: dict[str, int] = {}
        self._where: dict[str, tuple[str, HeaderTensor]] = {}
        headers: dict[str, bytes] = {}
        for file in self.files:
            check_plain_name(file.name, "the output")
            headers[file.name], placed = build_header(file.entries, file.metadata)
            for tensor in placed:
                if tensor.name in self._where:
                    raise ValueError(f"tensor '{tensor.name}' occurs in two output files")
                self._where[tensor.name] = (file.name, tensor)
        sizes = {file.name: len(headers[file.name]) + file.data_bytes for file in self.files}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            pending = [
                n for n in headers if not (resume and self._take_up(n, headers[n], sizes[n]))
            ]
            self._check_room(sum(sizes[name] for name in pending))
            for name in pending:
                self.laid_out = (*self.laid_out, name)
                self._lay_out(name, headers[name], sizes[name], fresh=not resume)
        except OSError as error:
            self._abandon()
            raise self._failure(error, sum(sizes.values())) from error
        except ResumeError:
            self.close()
            raise

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write `values` over elements [start, start + n) of the flattened tensor `name`.

        Any order, any thread; ranges written at the same time must not overlap.

        Raises:
            OutputError: the disk is full or fails.
            ValueError: the values have another dtype than the file, or lie outside the tensor.
        """
        file, tensor = self._where[name]
        if values.dtype != tensor.dtype:
            raise ValueError(f"'{name}' is laid out as {tensor.dtype}, got {values.dtype}")
        width = tensor.dtype.itemsize
        if start < 0 or (start + values.numel()) * width > tensor.nbytes:
            raise ValueError(f"'{name}': {values.numel()} values at {start} lie outside of it")
        flat = values.detach().reshape(-1).contiguous().cpu().view(torch.uint8)
        view = flat.numpy().data
        position = tensor.offset + start * width
        try:
            # One call moves at most 2 GiB on Linux, and may move less than asked.
            while view:
                count = os.pwrite(self._descriptors[file], view, position)
                view = view[count:]
                position += count
        except OSError as error:
            raise self._failure(error, tensor.nbytes) from error

    def read_back(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor as they are in the file, 1-D.

        Raises:
            OutputError: the file cannot be read.
        """
        file, tensor = self._where[name]
        width = tensor.dtype.itemsize
        stop = tensor.nbytes // width if stop is None else stop
        buffer = torch.empty((stop - start) * width, dtype=torch.uint8)
        try:
            read_exactly(self._descriptors[file], buffer, tensor.offset + start * width)
        except OSError as error:
            raise self._failure(error, tensor.nbytes) from error
        return buffer.view(tensor.dtype)

    def sync(self) -> None:
        """Force all files and the folder's listing to the disk.

        Raises:
            OutputError: the disk fails, or a delayed write found it full.
        """
        try:
            for descriptor in self._descriptors.values():
                os.fsync(descriptor)
            sync_folder(self.folder)
        except OSError as error:
            raise self._failure(error, 0) from error

    def close(self) -> None:
        """Close all files; not a substitute for `sync`."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_room(self, needed: int) -> None:
        # Asked before reserving: some file systems take what there is before they find it too
        # little, and other programs would meet a full disk meanwhile.
        usage = shutil.disk_usage(self.folder)
        if usage.total and needed > usage.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _abandon(self) -> None:
        """Give back the space of files that could not all be laid out."""
        started = [name for name in self.laid_out if name in self._descriptors]
        self.close()
        for name in started:
            (self.folder / name).unlink(missing_ok=True)

    def _lay_out(self, name: str, header: bytes, size: int, fresh: bool) -> None:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        # A link planted under the name would send the writes elsewhere.
        flags |= os.O_EXCL if fresh else getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(self.folder / name, flags, 0o666)
        self._descriptors[name] = descriptor
        _reserve(descriptor, size)
        # The header comes last: a file that has one has its final size.
        written = 0
        while written < len(header):
            written += os.pwrite(descriptor, header[written:], written)

    def _take_up(self, name: str, header: bytes, size: int) -> bool:
        """Open an existing file; False when a previous run had not finished laying it out."""
        path = self.folder / name
        try:
            descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            return False
        found = os.pread(descriptor, len(header), 0)
        if not any(found):
            os.close(descriptor)
            return False
        self._descriptors[name] = descriptor
        actual = os.fstat(descriptor).st_size
        if found != header or actual != size:
            what = "another header" if found != header else f"{actual:,} bytes instead of {size:,}"
            raise ResumeError(
                f"{path}: cannot be continued, it has {what}.\n"
                f"It belongs to another request or was damaged; remove {self.folder} to start anew."
            )
        return True

    def _failure(self, error: OSError, needed: int) -> OutputError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = _free_bytes(self.folder)
            return OutputError(
                f"{self.folder}: the disk is full ({error.strerror}).\n"
                f"Needed: {needed:,} bytes; free: {free:,} bytes.\n"
                "Make room or choose another output folder, then run the same command again."
            )
        where = error.filename or self.folder
        return OutputError(f"{where}: cannot be written ({error.strerror or error}).")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that it is either absent (or as before) or complete, on disk.

    Raises:
        OutputError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}).") from error


def check_replaced(path: Path, keys: Set[str], what: str) -> None:
    """Find out before any work whether a JSON file may be written there.

    Args:
        path: of the file.
        keys: those that an earlier file of the same kind has.
        what: will be written, for the message.

    Raises:
        RequestError: a folder, or a file that holds something else, is there.
    """
    if path.is_dir() or (path.is_file() and path.stat().st_size and not _has_keys(path, keys)):
        kind = "is a folder" if path.is_dir() else "holds something else"
        raise RequestError(
            f"{path}: {what} would be written there, and it {kind}.\nChoose another name."
        )


def _has_keys(path: Path, keys: Set[str]) -> bool:
    try:
        with path.open("rb") as file:
            if file.read(1) != b"{":  # it may be a checkpoint of many gigabytes
                return False
            found: Any = json.loads(b"{" + file.read())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and keys <= found.keys()


def sync_folder(folder: Path) -> None:
    """Force a folder's listing (names, renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force every file below a folder, and the folders' listings, to the disk."""
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    allocate = getattr(os, "posix_fallocate", None)  # absent on macOS
    if allocate is not None:
        try:
            allocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    # Sets the size where nothing could be reserved, and cuts off what a killed run left beyond it.
    os.ftruncate(descriptor, size)


def _free_bytes(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
