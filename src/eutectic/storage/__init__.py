"""Where files lie: what every room above does to them, and the local disk that does it."""

from eutectic.storage.interface import AppendedFile, Lock, OpenedFile, StagedFile, Storage
from eutectic.storage.local_disk import LOCAL_DISK
from eutectic.storage.open_files import OpenFiles

__all__ = [
    "AppendedFile",
    "Lock",
    "OpenFiles",
    "OpenedFile",
    "StagedFile",
    "Storage",
    "storage_of",
]


def storage_of(location: object) -> Storage:
    """Return the storage that holds a location.

    Every location is on the local disk so far. The one place to change for another storage.
    """
    del location
    return LOCAL_DISK
