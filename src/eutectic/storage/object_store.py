"""Object stores, as folders of this machine show them; see `mirror` and `ranged_files`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from eutectic.errors import CheckpointError
from eutectic.storage.interface import OpenedFile
from eutectic.storage.local_disk import LocalDisk
from eutectic.storage.mirror import RECORD, Stored, seen, stored_below, view
from eutectic.storage.placeholders import placeholder
from eutectic.storage.ranged_files import RangedFile
from eutectic.storage.remote_urls import is_staging, url_of


class ObjectStore(LocalDisk):
    """Files of an object store: read there, written here and sent when they are complete."""

    def list(self, folder: Path) -> Sequence[str]:
        if not is_staging(folder) and not seen(folder):
            try:
                view(folder)
            except CheckpointError as error:
                raise OSError(0, str(error)) from None
        return [name for name in super().list(folder) if name != RECORD]

    def files_below(self, folder: Path) -> Sequence[str]:
        return [name for name in super().files_below(folder) if name != RECORD]

    def identity(self, file: Path) -> tuple[int, int] | None:
        """Return bytes and a stamp of a file as it was when its folder was looked at."""
        held = placeholder(file)
        return super().identity(file) if held is None else (held.size, held.stamp)

    def identities(self, folder: Path, names: Sequence[str]) -> Mapping[str, tuple[int, int]]:
        """Ask the store, by one listing.

        CheckpointError where a file is another one than when its folder was looked at: what was
        read since may be of either.
        """
        url = url_of(folder)
        if url is None or is_staging(folder):
            return super().identities(folder, names)
        known: dict[str, Stored] = {}
        for stored in stored_below(url):
            known["/".join(stored.url.parts[len(url.parts) :])] = stored
        for name in names:
            held = placeholder(folder / name)
            if held is not None and (name not in known or held.stamp != known[name].stamp):
                raise CheckpointError(
                    f"{url / name}: changed while it was read; parts of the result may be of the "
                    "old content.\nNothing has been put in place. Run again when the files are "
                    "complete."
                )
        return {n: (known[n].size, known[n].stamp) for n in names if n in known}

    def open(self, file: Path) -> OpenedFile:
        held = placeholder(file)
        return super().open(file) if held is None else RangedFile(held)
