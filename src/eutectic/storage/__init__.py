"""Where files lie: what every room above does to them, and the local disk that does it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eutectic.storage.announcing import announce, announced_to
from eutectic.storage.folder_aside import FolderAside
from eutectic.storage.interface import AppendedFile, Lock, OpenedFile, StagedFile, Storage
from eutectic.storage.local_disk import LocalDisk
from eutectic.storage.written_files import WrittenFiles

__all__ = [
    "AppendedFile",
    "FolderAside",
    "Lock",
    "OpenedFile",
    "StagedFile",
    "Storage",
    "WrittenFiles",
    "announce",
    "announced_to",
    "folder_aside",
    "storage_of",
]

_LOCAL_DISK = LocalDisk()


def storage_of(location: Path) -> Storage:
    """Return the storage that holds a location; the one place where another kind is told apart."""
    del location  # all are on the local disk so far
    return _LOCAL_DISK


def folder_aside(
    output: Path, request: Mapping[str, Any], last: str, together: Path | None = None
) -> FolderAside:
    """Begin to write a folder aside; see `FolderAside`."""
    return FolderAside(output, storage_of(output), request, last, together)
