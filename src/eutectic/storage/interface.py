"""What a storage does.

Locations are paths with the surface of `pathlib`: joining, names, `exists`, `is_dir`, listing side
files and reading a small text are asked of them. A storage does what differs between a disk and an
object store, where nothing can be renamed, linked or written in place: large files are staged and
become visible by one `commit`.

All methods raise `OSError`, which callers turn into errors that say what they were doing.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol


class OpenedFile(Protocol):
    """A file that is read at any offset by any thread.

    Attributes:
        size: bytes of the file when it was opened.
        stamp: differs once the file was replaced or changed.
    """

    size: int
    stamp: Hashable

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on; OSError where the file ends early."""

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Be told of ranges (start, stop) that are about to be read, which may be fetched now."""

    def close(self) -> None:
        """Release the file."""


class StagedFile(OpenedFile, Protocol):
    """A file of fixed size that is filled at any offset, in any order, by any thread.

    It counts for nothing before its folder is committed.
    """

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of `data` from `offset` on."""

    def sync(self) -> None:
        """Force what was written into the storage; a delayed write fails here."""


class AppendedFile(Protocol):
    """A file that grows line by line, such as a journal."""

    def read(self) -> bytes:
        """Return all that it holds."""
        ...

    def cut(self, size: int) -> None:
        """Drop everything after the first `size` bytes."""

    def append(self, data: bytes) -> None:
        """Add `data`, which outlives this process when the call returns."""

    def close(self) -> None:
        """Release the file."""


class Lock(Protocol):
    """The right to be the only one to write somewhere; it ends with its process at the latest."""

    def leave_nothing(self) -> None:
        """Remove what stands for the lock, which goes on; a kill then leaves nothing."""
        ...

    def release(self) -> None:
        """Give the right up."""


class Storage(Protocol):
    """A place of files."""

    def list(self, folder: Path) -> Sequence[str]:
        """Return the sorted names in a folder; nothing where there is no folder."""
        ...

    def identity(self, file: Path) -> tuple[int, int] | None:
        """Return bytes and time of change (ns) of a file, links followed; None if it is absent."""
        ...

    def identities(self, folder: Path, names: Sequence[str]) -> Mapping[str, tuple[int, int]]:
        """Return the same of those files of a folder that exist, asked anew."""
        ...

    def open(self, file: Path) -> OpenedFile:
        """Open a file for reading at any offset."""
        ...

    def free_bytes(self, folder: Path) -> int | None:
        """Return the room for files in a folder that may not exist yet; None if it is unlimited."""
        ...

    def stage(self, file: Path, size: int, *, fresh: bool) -> StagedFile:
        """Reserve a file of `size` bytes, which is read there when its folder is committed.

        What it holds before it is written is undefined. With `fresh`, refuse one that exists; room
        that cannot be had in full is given back.
        """
        ...

    def staged(self, file: Path) -> StagedFile | None:
        """Take up a file that was staged earlier; None where there is none. Links are refused."""
        ...

    def replacing(self, file: Path) -> AbstractContextManager[BinaryIO]:
        """Write a file that is absent (or as before) until the block has ended without an error."""
        ...

    def append(self, file: Path) -> AppendedFile:
        """Open a file that grows, or create it."""
        ...

    def copy(self, source: Path, target: Path, *, share: bool = False) -> None:
        """Put a file's content under another name; `share` lets both names take room once."""

    def remove(self, location: Path) -> None:
        """Remove a file or a whole folder, if it is there."""

    def files_below(self, folder: Path) -> Sequence[str]:
        """Return the sorted names of all files in a folder and its folders, relative to it."""
        ...

    def discard(self, folder: Path, names: Sequence[str]) -> Sequence[str]:
        """Remove these of a folder, in this order, and the folder itself where nothing is left.

        Return the names of what is left: nobody said that it may go.
        """
        ...

    def obstacle(self, folder: Path) -> str | None:
        """Return why nothing can be committed to `folder`, whatever it holds; None if it can."""
        ...

    def commit(self, folder: Path, target: Path) -> None:
        """Force a folder into the storage and move it to `target`, in one step for its readers.

        `target` must not hold anything.
        """

    def lock(self, location: Path) -> Lock:
        """Become the only writer of a file or folder.

        What a killed writer of the file has left beside it is removed.

        Raises:
            BlockingIOError: another process is it.
        """
        ...
