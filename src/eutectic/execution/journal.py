"""The journal of a run: which tensors are finished, with what bytes, of which request."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from eutectic.errors import OutputError, RequestError, ResumeError
from eutectic.execution.tasks import Finished
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.storage import AppendedFile, storage_of
from eutectic.storage.small_files import parse_json

JOURNAL = "journal.jsonl"
_FORMAT = 2
_HEADER = b'{"eutectic_journal": '


class Ledger:
    """What is finished. `durable`: it outlives the process, so finished bytes are hashed."""

    durable = False

    def __init__(self) -> None:
        self.finished: dict[tuple[str, str], Finished] = {}

    def add(self, stage: str, tensor: str, finished: Finished) -> None:
        """Note a finished task."""
        self.finished[stage, tensor] = finished


def records_of(ledger: Ledger) -> dict[str, Any]:
    """Return tensor -> what its method reported, for tensors with something to report."""
    return {
        tensor: done.record
        for (stage, tensor), done in sorted(ledger.finished.items())
        if stage == "merge" and done.record
    }


def request_identity(plan: Plan, inputs: Inputs) -> str:
    """Return a hash of all that decides the output's bytes: recipe, decisions, inputs, version.

    Inputs count by name, size and time of change of their files, and by a sample of their content.
    """
    described = {
        "eutectic": version("eutectic"),
        "torch": version("torch"),
        "recipe": plan.request.complete,
        "tensors": [
            [
                *(t.name, t.shape, str(t.dtype), t.treatment.value, t.layout, t.method, t.scale),
                *([s.owner, s.tensor, s.rows, s.weight] for s in (t.base, *t.experts) if s),
            ]
            for t in plan.tensors
        ],
        "base": [inputs.base.fingerprint(), inputs.base.identity()],
        "experts": {n: [e.fingerprint(), e.identity()] for n, e in inputs.experts.items()},
        "initial": inputs.initial.identity() if inputs.initial else None,
        "statistics": {
            name: storage_of(Path(path)).identity(Path(path))
            for name, path in plan.request.statistics_files.items()
        },
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


class _Line(BaseModel):
    """A line of a journal: a finished task, and what it gave."""

    model_config = ConfigDict(strict=True, extra="forbid")

    stage: str
    tensor: str
    sha256: str
    record: dict[str, Any]
    norms: dict[str, float]


class Journal(Ledger):
    """An append-only file of finished jobs beside an unfinished output; locked while in use."""

    durable = True

    def __init__(self, folder: Path, identity: str, *, restart: bool = False) -> None:
        """Open or continue a run's journal; `restart` empties the folder, if it is a run's own."""
        super().__init__()
        self.path = folder / JOURNAL
        self._lock = threading.Lock()
        self._storage = storage_of(folder)
        self._file: AppendedFile | None = None
        try:
            if self._storage.list(folder) and not self.path.exists():
                raise ResumeError(
                    f"{folder} exists and is not an unfinished merge.\n"
                    "Move it away, or choose another output."
                )
            self._owned = self._storage.lock(folder)
            try:
                if restart:
                    self._discard()
                self._file = self._storage.append(self.path)
                self.resumed = self._read(identity)
            except BaseException:
                self.close()
                raise
        except BlockingIOError:
            raise RequestError(f"another process is merging into {folder}.") from None
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror or error}.") from None

    def _discard(self) -> None:
        """Empty the folder while the lock is held, so that nobody's running merge is deleted."""
        found = self.path.read_bytes() if self.path.exists() else b""
        if not _HEADER.startswith(found[: len(_HEADER)]):
            raise ResumeError(f"{self.path} is not the journal of a merge.\nMove it away.")
        # The journal goes last: without it, the rest would pass for somebody else's.
        names = [name for name in self._storage.list(self.path.parent) if name != JOURNAL]
        for name in (*names, JOURNAL):
            self._storage.remove(self.path.parent / name)

    def _read(self, identity: str) -> bool:
        assert self._file is not None
        header = _line({"eutectic_journal": _FORMAT, "identity": identity})
        lines = self._file.read().splitlines(keepends=True)
        # A kill may cut the last line short.
        torn = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        if lines[:1] != [header] and not (lines == [] and header.startswith(torn)):
            raise ResumeError(
                f"{self.path.parent} holds an unfinished merge of another request: the recipe, an "
                "input or the version has changed since.\n"
                "Repeat the earlier command to finish it, or start over with --restart."
            )
        self._file.cut(sum(map(len, lines)))
        if not lines:
            self._write(header)
            return False
        for line in lines[1:]:
            # A line that the disk lost, such as one of zeros after a power cut, costs its tensor.
            with suppress(ValueError):
                item = _Line.model_validate(parse_json(line))
                done = Finished(item.sha256, item.record, item.norms)
                self.finished[item.stage, item.tensor] = done
        return True

    def add(self, stage: str, tensor: str, finished: Finished) -> None:
        """Note a finished job; the line is handed to the system before this returns."""
        super().add(stage, tensor, finished)
        self._write(_line({"stage": stage, "tensor": tensor, **vars(finished)}))

    def _write(self, line: bytes) -> None:
        assert self._file is not None
        try:
            with self._lock:
                self._file.append(line)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}.") from None

    def remove_folder(self) -> None:
        """Remove the run's folder while the lock is held; the run is finished."""
        self._close_file()
        self._owned.leave_nothing()  # first: a kill in between leaves a run that can be finished
        self._storage.remove(self.path.parent)

    def close(self) -> None:
        """Close the file and release the lock."""
        self._close_file()
        self._owned.release()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(item: Mapping[str, Any]) -> bytes:
    return json.dumps(item).encode() + b"\n"
