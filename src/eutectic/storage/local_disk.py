"""The local disk: positioned reads and writes, hard links, and a rename to commit."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from eutectic.storage.announcing import announce
from eutectic.storage.interface import Lock, OpenedFile, Storage
from eutectic.storage.placeholders import placeholder
from eutectic.storage.small_files import check_regular, open_regular

_CLOSED_ON_EXEC = getattr(os, "O_CLOEXEC", 0)
_BYTES = getattr(os, "O_BINARY", 0)  # Windows would translate line ends
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_UNFINISHED = ".unfinished"


class LocalDisk(Storage):
    """Files of this machine, or of a file system mounted on it; see `Storage`."""

    def list(self, folder: Path) -> Sequence[str]:
        try:
            return sorted(n for n in os.listdir(folder) if not _is_leftover(n))  # noqa: PTH208
        except FileNotFoundError:
            return []

    def identity(self, file: Path) -> tuple[int, int] | None:
        if not file.exists():
            return None
        status = file.stat()
        return status.st_size, status.st_mtime_ns

    def identities(self, folder: Path, names: Sequence[str]) -> Mapping[str, tuple[int, int]]:
        found = ((name, self.identity(folder / name)) for name in names)
        return {name: known for name, known in found if known is not None}

    def open(self, file: Path) -> OpenedFile:
        return PositionedFile(open_regular(file))

    def free_bytes(self, folder: Path) -> int | None:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        usage = shutil.disk_usage(folder)
        return usage.free if usage.total else None

    def stage(self, file: Path, size: int, *, fresh: bool) -> PositionedFile:
        announce(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        # A link planted under the name would send the writes elsewhere.
        own = os.O_EXCL if fresh else _NO_LINK
        flags = os.O_RDWR | os.O_CREAT | _BYTES | _CLOSED_ON_EXEC | own
        staged = PositionedFile(os.open(file, flags, 0o666))
        try:
            staged.reserve(size)
        except OSError:
            staged.close()
            file.unlink()
            raise
        return staged

    def staged(self, file: Path) -> PositionedFile | None:
        try:
            return PositionedFile(os.open(file, os.O_RDWR | _BYTES | _CLOSED_ON_EXEC | _NO_LINK))
        except FileNotFoundError:
            return None

    @contextmanager
    def replacing(self, file: Path) -> Iterator[BinaryIO]:
        """Write under another name beside `file`, and rename when it is on the disk."""
        announce(file)
        if file.exists() and not file.is_file():  # the rename would put a file in its place
            raise OSError(errno.EINVAL, "exists and is no regular file", str(file))
        # The process is part of the name: two that write the same file do not mix their bytes.
        aside = file.with_name(f".{file.name}.{os.getpid()}{_UNFINISHED}")
        try:
            self._sweep(file, _is_abandoned)
            with aside.open("wb") as written:
                yield written
                written.flush()
                os.fsync(written.fileno())
            aside.replace(file)
            _sync(file.parent)
        finally:
            aside.unlink(missing_ok=True)

    def append(self, file: Path) -> GrowingFile:
        file.parent.mkdir(parents=True, exist_ok=True)
        return GrowingFile(file)

    def copy(self, source: Path, target: Path, *, share: bool = False) -> None:
        """Copy a file, links followed; with `share`, make a hard link where that is possible."""
        announce(target)
        if target.exists() and not target.is_file():
            raise OSError(errno.EINVAL, "exists and is no regular file", str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        if placeholder(source) is not None:
            check_regular(source)
        if share:
            target.unlink(missing_ok=True)
            with suppress(OSError):  # other file system, or one without hard links
                os.link(source, target)
                return
        shutil.copyfile(source, target)

    def remove(self, location: Path) -> None:
        announce(location)
        if location.is_dir() and not location.is_symlink():
            shutil.rmtree(location)
        else:
            location.unlink(missing_ok=True)

    def files_below(self, folder: Path) -> Sequence[str]:
        found = (path.relative_to(folder) for path in folder.rglob("*") if not _is_folder(path))
        return sorted(path.as_posix() for path in found if not _is_leftover(path.name))

    def discard(self, folder: Path, names: Sequence[str]) -> Sequence[str]:
        for name in names:
            self.remove(folder / name)
        left = self.list(folder)
        if not left and folder.is_dir():
            for name in os.listdir(folder):  # noqa: PTH208 - leftovers alone
                (folder / name).unlink()
            folder.rmdir()
        return left

    def obstacle(self, folder: Path) -> str | None:
        # os.path answers "no" where a folder above may not be searched; the last check tells.
        if os.path.islink(folder) or (os.path.exists(folder) and not folder.is_dir()):  # noqa: PTH110, PTH114
            return f"{folder} exists and is a file or a link, not a folder. Choose another output."
        if os.path.ismount(folder):
            return f"{folder} is a mount point and cannot be replaced. Name a folder in it."
        above = next((p for p in (folder.parent, *folder.parent.parents) if p.exists()), None)
        if above is not None and not os.access(above, os.W_OK | os.X_OK):
            return f"{above} cannot be written. Choose another output."
        return None

    def commit(self, folder: Path, target: Path) -> None:
        for path in [folder, *folder.rglob("*")]:
            if _is_leftover(path.name):
                path.unlink()
            else:
                _sync(path)
        if os.name == "nt" and target.is_dir():
            target.rmdir()  # elsewhere, the rename replaces an empty folder in one step
        folder.rename(target)
        _sync(target.parent)

    def lock(self, location: Path) -> Lock:
        """Lock `<location>.lock`, which is removed with the lock."""
        lock = FileLock(location.with_name(location.name + ".lock"))
        with suppress(OSError):  # nothing that a run depends on
            self._sweep(location, lambda _: True)
        return lock

    def _sweep(self, file: Path, abandoned: Callable[[str], bool]) -> None:
        """Remove what processes have left that were killed while they wrote `file`."""
        start = f".{file.name}."
        with suppress(FileNotFoundError):
            for name in os.listdir(file.parent):  # noqa: PTH208
                middle = name[len(start) : -len(_UNFINISHED)]
                ours = name.startswith(start) and name.endswith(_UNFINISHED) and middle.isdigit()
                if ours and abandoned(middle):
                    file.with_name(name).unlink(missing_ok=True)


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
        self._links = status.st_nlink  # some file systems count none
        self.stamp: Hashable = (status.st_ino, status.st_size, status.st_mtime_ns)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        # One call moves at most 2 GiB on Linux, and may move less than asked.
        while done < len(buffer):
            count = self._read(buffer[done:], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "the file ends early; it changed since it was opened")
            done += count

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Do nothing: the system reads ahead."""

    def write(self, data: memoryview, offset: int) -> None:
        self._check_whole()
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
        os.fsync(self._descriptor)
        self._check_whole()
        if self._links and not os.fstat(self._descriptor).st_nlink:
            raise OSError(errno.ESTALE, "the file was removed or replaced while it was written")

    def _check_whole(self) -> None:
        """Raise OSError where somebody cut the file: what comes later would fill it with zeros."""
        if os.fstat(self._descriptor).st_size != self.size:
            raise OSError(errno.ESTALE, "the file was cut off or grew while it was written")

    def close(self) -> None:
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


class GrowingFile:
    """A file to which lines are added; each is handed to the system before `append` returns."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("a+b", buffering=0)

    def read(self) -> bytes:
        self._file.seek(0)
        return self._file.read()

    def cut(self, size: int) -> None:
        self._file.truncate(size)

    def append(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        self._file.close()


class FileLock:
    """A lock file held by this process; the system releases it when the process is killed."""

    def __init__(self, file: Path) -> None:
        import filelock

        file.parent.mkdir(parents=True, exist_ok=True)
        self._path = file
        # Not bound to a thread: whoever holds the object may release it.
        self._lock = filelock.FileLock(file, timeout=0, thread_local=False)
        try:
            self._lock.acquire()
            self._there = True
        except filelock.Timeout:
            raise BlockingIOError(f"{file} is locked by another process") from None

    def leave_nothing(self) -> None:
        """Remove the file while the lock is held: afterwards it may be another process's.

        Windows cannot do that, and filelock removes the file there.
        """
        if os.name != "nt" and self._lock.is_locked and self._there:
            for _ in range(2):  # what failed once need not fail again
                with suppress(OSError):
                    self._path.unlink(missing_ok=True)
                    break
            self._there = False

    def release(self) -> None:
        """Release the lock and remove its file."""
        self.leave_nothing()
        self._lock.release()


def _is_abandoned(process: str) -> bool:
    """Tell whether no process of this machine has that number; where that is unknown, say no."""
    if os.name == "nt":
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_leftover(name: str) -> bool:
    """Tell whether a file was being written by `replacing` when its process was killed."""
    return name.startswith(".") and name.endswith(_UNFINISHED)


def _sync(path: Path) -> None:
    """Force a file, or a folder's listing (names, renames), to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such call
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
