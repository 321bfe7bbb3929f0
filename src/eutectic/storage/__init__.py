"""Where files lie: what every room above does to them, and the local disk and stores that do it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eutectic.storage.announcing import announce, announced_to
from eutectic.storage.folder_aside import FolderAside
from eutectic.storage.interface import AppendedFile, Lock, OpenedFile, StagedFile, Storage
from eutectic.storage.kept_folder import kept_folder, names_kept
from eutectic.storage.local_disk import LocalDisk
from eutectic.storage.mirror import MANIFEST, make_all_whole, view, view_once
from eutectic.storage.nearby import meant
from eutectic.storage.object_store import ObjectStore
from eutectic.storage.remote_urls import MARK, Url, is_url, local_path, seen_from, url_of
from eutectic.storage.written_files import WrittenFiles

__all__ = [
    "MANIFEST",
    "AppendedFile",
    "FolderAside",
    "Lock",
    "OpenedFile",
    "StagedFile",
    "Storage",
    "Url",
    "WrittenFiles",
    "announce",
    "announced_to",
    "folder_aside",
    "can_hold",
    "is_url",
    "kept_folder",
    "local_path",
    "make_all_whole",
    "meant",
    "names_kept",
    "seen_from",
    "storage_of",
    "url_of",
    "view",
    "view_once",
]

_LOCAL_DISK = LocalDisk()
_OBJECT_STORE = ObjectStore()


def storage_of(location: Path) -> Storage:
    """Return the storage that holds a location; the one place where another kind is told apart."""
    return _OBJECT_STORE if MARK in str(location) and url_of(location) else _LOCAL_DISK


def can_hold(folder: Path) -> bool:
    """Tell whether files can be put into a folder: it is there, or in a store, which needs none."""
    return folder.is_dir() or url_of(folder) is not None


def folder_aside(
    output: Path, request: Mapping[str, Any], last: str, together: Path | None = None
) -> FolderAside:
    """Begin to write a folder aside; see `FolderAside`."""
    return FolderAside(output, storage_of(output), request, last, together)
