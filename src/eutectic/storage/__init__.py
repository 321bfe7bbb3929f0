"""Where files lie: what every room above does to them, and the local disk that does it."""

from pathlib import Path

from eutectic.storage.interface import AppendedFile, Lock, OpenedFile, StagedFile, Storage
from eutectic.storage.local_disk import LocalDisk

__all__ = ["AppendedFile", "Lock", "OpenedFile", "StagedFile", "Storage", "storage_of"]

_LOCAL_DISK = LocalDisk()


def storage_of(location: Path) -> Storage:
    """Return the storage that holds a location; the one place where another kind is told apart."""
    del location  # all are on the local disk so far
    return _LOCAL_DISK
