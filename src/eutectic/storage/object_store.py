"""Object stores, as folders of this machine show them; see `mirror` and `ranged_files`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from eutectic.errors import CheckpointError
from eutectic.storage.hub_uploads import send_to_hub
from eutectic.storage.interface import OpenedFile
from eutectic.storage.local_disk import LocalDisk
from eutectic.storage.mirror import MANIFEST, RECORD, Stored, forget, seen, stored_below, view
from eutectic.storage.placeholders import placeholder
from eutectic.storage.ranged_files import RangedFile
from eutectic.storage.remote_urls import is_staging, url_of
from eutectic.storage.uploads import put_file, send_folder


def _mark(target: Path) -> Path:
    """Return the file that stands beside an output while its files are made to be seen."""
    return target.with_name(f"{target.name}.sending.partial")


class ObjectStore(LocalDisk):
    """Files of an object store: read there, written here and sent when they are complete."""

    def list(self, folder: Path) -> Sequence[str]:
        if not is_staging(folder) and not seen(folder):
            self._view(folder)
        names = [name for name in super().list(folder) if name != RECORD]
        return names if is_staging(folder) else self._but_unfinished(folder, names)

    def _view(self, folder: Path) -> None:
        try:
            view(folder)
        except CheckpointError as error:
            raise OSError(0, str(error)) from None

    def _but_unfinished(self, folder: Path, names: Sequence[str]) -> Sequence[str]:
        """Return the names but those of an upload from here that was killed in its last moments."""
        mark = _mark(folder)
        if not names or not mark.exists():
            return names
        told = json.loads(mark.read_bytes())
        there = {*self.files_below(folder)}
        if {MANIFEST, *told["files"]} <= there:  # only what is here was left
            super().remove(Path(told["folder"]))
            mark.unlink()
            return names
        return names if there - {*told["files"]} else []

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

    def obstacle(self, folder: Path) -> str | None:
        if not is_staging(folder):
            try:
                view(folder)
            except CheckpointError as error:
                return f"{error}\nNothing can be written there."
        return super().obstacle(folder)

    @contextmanager
    def replacing(self, file: Path) -> Iterator[BinaryIO]:
        """Write a file here, and send it when it is complete."""
        url = None if is_staging(file) else url_of(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        with super().replacing(file) as written:
            yield written
            if url is not None:
                written.flush()
                put_file(Path(written.name), url)
        if url is not None:
            forget(file)

    def commit(self, folder: Path, target: Path) -> None:
        """Send a folder; see `uploads`. What is here of it is removed when all of it is there."""
        url = url_of(target)
        if url is None or is_staging(target):
            super().commit(folder, target)
            return
        names = self.files_below(folder)
        mark = _mark(target)
        told = json.dumps({"folder": str(folder), "files": list(names)}).encode()
        begin = partial(self._put_mark, mark, told)
        send = send_to_hub if url.scheme == "hf" else send_folder
        send(folder, names, url, begin)
        super().remove(folder)
        mark.unlink(missing_ok=True)
        forget(target)
        self._view(target)

    def _put_mark(self, mark: Path, told: bytes) -> None:
        """Note that files of a folder are about to be seen, which a kill would leave unfinished."""
        with super().replacing(mark) as file:
            file.write(told)

    def open(self, file: Path) -> OpenedFile:
        held = placeholder(file)
        return super().open(file) if held is None else RangedFile(held)
