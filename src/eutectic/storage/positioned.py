"""Reads and writes at given offsets of one descriptor, from many threads, on every system."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Hashable


class PositionedFile:
    """An open descriptor that is read and written at any offset by any thread.

    One system call each where the system has such calls; else the descriptor's own position is
    moved under a lock.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = threading.Lock()
        status = os.fstat(descriptor)
        self.size = status.st_size
        self.stamp: Hashable = (status.st_ino, status.st_size, status.st_mtime_ns)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset` on.

        Raises:
            OSError: as the system reports it, or EIO where the file ends early.
        """
        done = 0
        # One call moves at most 2 GiB on Linux, and may move less than asked.
        while done < len(buffer):
            count = self._read(buffer[done:], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "the file ends early; it changed since it was opened")
            done += count

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` from byte `offset` on."""
        while data:
            count = self._write(data, offset)
            data = data[count:]
            offset += count

    def reserve(self, size: int) -> None:
        """Give the file its final size, and room on the disk where the file system can."""
        allocate = getattr(os, "posix_fallocate", None)  # absent on macOS and Windows
        if allocate is not None:
            try:
                allocate(self._descriptor, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        # Sets the size where nothing could be reserved, and cuts off what a killed run left.
        os.ftruncate(self._descriptor, size)
        self.size = size

    def sync(self) -> None:
        """Force what was written to the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)

    def _read(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [buffer], offset)
        with self._position:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            found = os.read(self._descriptor, len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def _write(self, data: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._descriptor, data, offset)
        with self._position:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.write(self._descriptor, data)
