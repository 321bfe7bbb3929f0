"""Reading flat ranges of tensors from disk, from many threads at once."""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from eutectic.checkpoint.content import sampled_fingerprint
from eutectic.checkpoint.index import CheckpointIndex, TensorEntry
from eutectic.checkpoint.pickles import load_pickle
from eutectic.errors import CheckpointError

# Per reader: checkpoints of hundreds of shards, times many experts, would exhaust the usual limit
# of 1024 open files.
_MAX_OPEN_FILES = 16


class CheckpointReader:
    """Reads the tensors of one checkpoint; safe to share between threads.

    Safetensors are read by positioned reads straight into the tensors' memory, so that nothing
    beyond the requested range becomes resident. Torch pickles are memory-mapped where their format
    allows and copied out.
    """

    is_delta = False

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self._files = _OpenFiles(index.folder)
        self._pickles: dict[str, dict[str, Tensor]] = {}
        self._lock = threading.Lock()

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Tensors by name."""
        return self.index.entries

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of the flattened tensor.

        Returns:
            A 1-D tensor in the file's dtype, in memory of its own.

        Raises:
            CheckpointError: no such tensor, or the file ends early or changed while being read.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.index.folder}: has no tensor '{name}'.")
        stop = entry.numel if stop is None else stop
        if not 0 <= start <= stop <= entry.numel:
            raise ValueError(f"'{name}': range {start}:{stop} outside 0:{entry.numel}")
        if entry.offset < 0:
            return self._pickle(entry.file)[name].view(-1)[start:stop].clone()
        width = entry.dtype.itemsize
        buffer = torch.empty((stop - start) * width, dtype=torch.uint8)
        with self._files.open(entry.file) as descriptor:
            try:
                read_exactly(descriptor, buffer, entry.offset + start * width)
            except OSError as error:
                raise CheckpointError(
                    f"{self.index.folder / entry.file}: '{name}' cannot be read "
                    f"({error.strerror or error})."
                ) from error
        if entry.dtype is torch.bool and bool((buffer > 1).any()):
            raise CheckpointError(
                f"{self.index.folder / entry.file}: '{name}' is boolean but holds other bytes "
                "than 0 and 1.\nDownload or save the file again."
            )
        return buffer.view(entry.dtype)

    def fingerprint(self) -> str:
        """Return the sampled identity of the content; see `content.sampled_fingerprint`."""
        return sampled_fingerprint(self)

    def identity(self) -> list[tuple[str, int, int]]:
        """Return (name, bytes, mtime in ns) of every file that the checkpoint consists of."""
        names = [*self.index.files, self.index.weight_index, "config.json"]
        return file_identity(self.index.folder, [n for n in names if n])

    def close(self) -> None:
        """Close all files; reading afterwards opens them again."""
        self._files.close()
        with self._lock:
            self._pickles.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pickle(self, file: str) -> dict[str, Tensor]:
        with self._lock:
            if file not in self._pickles:
                tensors, _ = load_pickle(self.index.folder / file)
                # Once here, or every chunk of a strided tensor would copy the whole of it.
                self._pickles[file] = {name: t.contiguous() for name, t in tensors.items()}
            return self._pickles[file]


def file_identity(folder: Path, names: list[str]) -> list[tuple[str, int, int]]:
    """Return (name, bytes, mtime in ns) of those files in `folder` that exist, links followed."""
    found: list[tuple[str, int, int]] = []
    for name in names:
        path = folder / name
        if path.exists():
            status = path.stat()
            found.append((name, status.st_size, status.st_mtime_ns))
    return found


def read_exactly(descriptor: int, buffer: Tensor, offset: int) -> None:
    """Fill the uint8 tensor `buffer` from byte `offset` on.

    Raises:
        OSError: as the system reports it, or EIO where the file ends early.
    """
    view = buffer.numpy().data
    done = 0
    # One call moves at most 2 GiB on Linux, and may move less than asked.
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the file ends early; it changed since it was opened")
        done += count


class _OpenFiles:
    """Descriptors opened on demand; the least recently used idle one is closed when many are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._idle: OrderedDict[str, int] = OrderedDict()
        self._busy: dict[str, tuple[int, int]] = {}
        self._seen: dict[str, tuple[int, int, int]] = {}

    @contextmanager
    def open(self, name: str) -> Iterator[int]:
        """Lend the descriptor of file `name`."""
        with self._lock:
            descriptor, users = self._busy.get(name, (-1, 0))
            if users == 0:
                descriptor = self._idle.pop(name, -1)
                if descriptor < 0:
                    descriptor = self._open(name)
            self._busy[name] = (descriptor, users + 1)
        try:
            yield descriptor
        finally:
            with self._lock:
                descriptor, users = self._busy.pop(name)
                if users > 1:
                    self._busy[name] = (descriptor, users - 1)
                else:
                    self._idle[name] = descriptor
                    while self._idle and len(self._idle) + len(self._busy) > _MAX_OPEN_FILES:
                        os.close(self._idle.popitem(last=False)[1])

    def close(self) -> None:
        """Close every descriptor that nobody is using."""
        with self._lock:
            while self._idle:
                os.close(self._idle.popitem()[1])

    def _open(self, name: str) -> int:
        path = self._folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened ({error.strerror}).") from error
        status = os.fstat(descriptor)
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._seen.setdefault(name, stamp) != stamp:
            os.close(descriptor)
            raise CheckpointError(f"{path}: the file was replaced or changed while being read.")
        return descriptor
