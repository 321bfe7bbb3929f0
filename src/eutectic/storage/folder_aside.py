"""A folder that is written aside and gets its name when it is complete, in one step.

For verbs that keep nothing of an unfinished run. In `<output>.partial` lie a mark, by which the
folder is known to be a run's own, what is written, and a list of it: files that somebody else has
put there are neither deleted nor published.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from eutectic.errors import OutputError, RequestError, ResumeError, why_failed
from eutectic.storage.interface import Storage
from eutectic.storage.written_files import WrittenFiles

_MARK = "unfinished.json"
_CONTENT = "folder"
_LIST = "written.jsonl"
_KEY = "eutectic_unfinished"


class FolderAside:
    """The one run that writes a folder, which is empty or absent until `commit`.

    Attributes:
        output: its name.
        finished: a run of the same request was killed after it had given the folder its name;
            there is nothing left to do but to call `clear`.
    """

    def __init__(
        self,
        output: Path,
        storage: Storage,
        request: Mapping[str, Any],
        last: str,
        together: Path | None = None,
    ) -> None:
        """Take the lock, and find out what an earlier run has left.

        Args:
            output: the folder to write.
            storage: where it lies.
            request: all that decides what is written.
            last: the name of a file that is in every finished folder.
            together: another folder that the same run writes, and clears after this one or before.
        """
        if output.name in ("", ".."):
            raise RequestError(f"'{output}' has no name of its own. Name a new folder.")
        obstacle = storage.obstacle(output)
        if obstacle is not None:
            raise RequestError(obstacle)
        self.output, self._storage = output, storage
        self._work = _work(output)
        self._content = self._work / _CONTENT
        described = json.dumps(request, sort_keys=True, default=str)
        identity = hashlib.sha256(described.encode()).hexdigest()
        self._mark = json.dumps({_KEY: identity}).encode()
        try:
            self._lock = storage.lock(self._work)
            try:
                self._written = self._list()
                self.finished = self._finished_before(last, together)
            except BaseException:
                self._lock.release()
                raise
        except BlockingIOError:
            raise RequestError(f"another process is writing {output}.") from None
        except OSError as error:
            raise self._failure(error) from None

    def _finished_before(self, last: str, together: Path | None) -> bool:
        held = self._storage.list(self._work)
        strangers = [name for name in held if name not in (_MARK, _CONTENT, _LIST)]
        found = _mark(self._work)
        begun = f'{{"{_KEY}":'.encode()
        if held and (strangers or not found.startswith(begun)):
            why = f" It holds '{strangers[0]}'." if strangers else ""
            raise ResumeError(
                f"{self._work} exists and is not left by a run that was killed.{why}\n"
                "Move it away, or choose another output."
            )
        self._written.check()
        if not self._storage.list(self.output):
            return False
        # A folder that was moved leaves its work folder, and at last that without its mark.
        works = [self._work] if held or together is None else [self._work, _work(together)]
        left = [work for work in works if work.is_dir() and not (work / _CONTENT).exists()]
        moved = any(_mark(w) == self._mark or not self._storage.list(w) for w in left)
        if moved and (self.output / last).exists():
            return True
        raise RequestError(f"{self.output}: not empty; name a new folder.")

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """Give the empty folder to write into; what the block writes is the run's own."""
        try:
            self._discard()
            self._work.mkdir(parents=True, exist_ok=True)
            with self._storage.replacing(self._work / _MARK) as file:
                file.write(self._mark)
            self._content.mkdir()
            self._written = self._list()
        except OSError as error:
            raise self._failure(error) from error
        with self._written.writing():
            yield self._content

    def commit(self) -> None:
        """Give the folder its name."""
        self._written.check()
        try:
            self._storage.commit(self._content, self.output)
        except OSError as error:
            raise self._failure(error) from error

    def _list(self) -> WrittenFiles:
        return WrittenFiles(self._content, self._work / _LIST, self._storage)

    def _discard(self) -> None:
        """Remove what runs have made; the mark goes last, for it says whose the rest is."""
        if not self._written.discard():
            self._storage.discard(self._work, (_LIST, _MARK))

    def clear(self) -> None:
        """Remove what lies beside the finished folder."""
        self._lock.leave_nothing()
        try:
            try:
                self._discard()
            except OSError:  # what failed once need not fail again
                self._discard()
        except OSError as error:
            raise OutputError(
                f"{self.output} is complete, but {self._work} cannot be removed "
                f"({why_failed(error)})."
            ) from error

    def _failure(self, error: OSError) -> OutputError:
        where = error.filename or self._work
        return OutputError(f"{where}: cannot be written ({why_failed(error)}).")

    def __enter__(self) -> FolderAside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Give up the lock; after an error of the run also what it has written."""
        try:
            # Once the folder has its name, the mark says whose it is.
            if isinstance(error, Exception) and not self._storage.list(self.output):
                self._discard()
        except OSError:
            pass  # the next run does it; what matters is the first error
        finally:
            self._lock.release()


def _work(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _mark(work: Path) -> bytes:
    file = work / _MARK
    return file.read_bytes() if file.is_file() else b""
