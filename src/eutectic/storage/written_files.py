"""Which files of an unfinished folder a run has made; no other is deleted or published."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from eutectic.errors import ResumeError
from eutectic.storage.announcing import announced_to
from eutectic.storage.interface import AppendedFile, Storage
from eutectic.storage.small_files import JOURNAL_BYTES, parse_json, read_bytes
from eutectic.words import few

# safetensors writes each file under such a name, and renames it.
_ASIDE_BY_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")


class WrittenFiles:
    """The names that a run has written below `folder`, one a line in the file `listed`.

    A line is handed to the system before the file is made, so that a kill leaves no file unlisted.
    A folder that is listed stands for all that is below it.
    """

    def __init__(self, folder: Path, listed: Path, storage: Storage) -> None:
        """Read what an earlier run has listed."""
        self.folder, self._listed, self._storage = folder, listed, storage
        self._names: set[str] = set()
        self._file: AppendedFile | None = None
        lines = read_bytes(listed, JOURNAL_BYTES).splitlines() if listed.exists() else []
        for line in lines:
            with suppress(ValueError):  # a kill cut it short, before its file was made
                name = parse_json(line)
                self._names.update([name] if isinstance(name, str) else [])

    def strangers(self) -> Sequence[str]:
        """Return the files that no run has made."""
        return [name for name in self._storage.files_below(self.folder) if not self._is_own(name)]

    def check(self) -> None:
        """Refuse a folder with files that no run has made.

        Raises:
            ResumeError: there are some; it names them.
        """
        if strangers := self.strangers():
            raise ResumeError(
                f"{self.folder} holds {few(strangers)}, which no run wrote.\n"
                "Move it away, then run the same command again; nothing is lost."
            )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """List every file that is written in the block; refuse to replace one of somebody else."""
        self._file = self._storage.append(self._listed)
        try:
            with announced_to(self._will_write):
                yield
        finally:
            self._file.close()
            self._file = None

    def discard(self) -> Sequence[str]:
        """Remove what runs have written below the folder; return what else it holds."""
        if not (strangers := self.strangers()):
            self._storage.remove(self.folder)
            return ()
        for name in sorted(self._names):
            if _stays_inside(name):
                self._storage.remove(self.folder / name)
        return strangers

    def _will_write(self, file: Path) -> None:
        if not file.is_relative_to(self.folder):
            return
        name = file.relative_to(self.folder).as_posix()
        if self._is_own(name):
            return
        if file.exists() or file.is_symlink():
            self.check()
        self._names.add(name)
        assert self._file is not None
        self._file.append(json.dumps(name).encode() + b"\n")

    def _is_own(self, name: str) -> bool:
        parents = PurePosixPath(name).parents
        if name in self._names or any(str(above) in self._names for above in parents):
            return True
        return _ASIDE_BY_SAFETENSORS.fullmatch(PurePosixPath(name).name) is not None


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and name not in ("", ".")
