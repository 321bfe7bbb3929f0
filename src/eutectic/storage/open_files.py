"""The files of one folder, opened on demand and read by many threads at once."""

import errno
import threading
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path

from eutectic.storage.interface import OpenedFile, Storage

# Per folder: checkpoints of hundreds of shards, times many experts, would exhaust the usual limit
# of 1024 open files.
_MAX_OPEN_FILES = 16


class OpenFiles:
    """Files opened on demand; the least recently used idle one is closed when many are open."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        self._storage = storage
        self._folder = folder
        self._lock = threading.Lock()
        self._idle: OrderedDict[str, OpenedFile] = OrderedDict()
        self._busy: dict[str, tuple[OpenedFile, int]] = {}
        self._seen: dict[str, Hashable] = {}

    def read_into(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes of file `name` from `offset` on.

        Raises:
            OSError: the file cannot be opened or read, ends early, or is another one than before.
        """
        with self._lock:
            if name in self._busy:
                file, users = self._busy[name]
            else:
                file, users = self._idle.pop(name, None) or self._open(name), 0
            self._busy[name] = (file, users + 1)
        try:
            file.read_into(buffer, offset)
        finally:
            with self._lock:
                file, users = self._busy.pop(name)
                if users > 1:
                    self._busy[name] = (file, users - 1)
                else:
                    self._idle[name] = file
                    while self._idle and len(self._idle) + len(self._busy) > _MAX_OPEN_FILES:
                        self._idle.popitem(last=False)[1].close()

    def close(self) -> None:
        """Close every file that nobody is reading; reading opens them again."""
        with self._lock:
            while self._idle:
                self._idle.popitem()[1].close()

    def _open(self, name: str) -> OpenedFile:
        file = self._storage.open(self._folder / name)
        if self._seen.setdefault(name, file.stamp) != file.stamp:
            file.close()
            raise OSError(errno.ESTALE, "the file was replaced or changed while being read")
        return file
