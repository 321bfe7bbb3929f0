"""The journal of a run: which tensors are finished, with what bytes, of which request."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from eutectic.errors import OutputError, RequestError, ResumeError
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Finished:
    """One finished job.

    Attributes:
        sha256: of the bytes written.
        norm: Frobenius norm of the merged delta, before α.
        record: what the method reported.
    """

    sha256: str
    norm: float
    record: dict[str, Any]


def request_identity(plan: Plan, inputs: Inputs) -> str:
    """Return a hash of all that decides the output's bytes: recipe, decisions, inputs, version.

    Inputs count by name, size and time of change of their files, and by a sample of their content.
    """
    described = {
        "eutectic": version("eutectic"),
        "recipe": plan.recipe.model_dump(mode="json"),
        "tensors": [
            [t.name, t.method, t.decision.treatment.value, t.scale, str(t.dtype), t.experts]
            for t in plan.tensors
        ],
        "base": [inputs.base.fingerprint(), inputs.base.identity()],
        "experts": {n: [e.fingerprint(), e.identity()] for n, e in inputs.experts.items()},
        "initial": inputs.initial.identity() if inputs.initial else None,
        "statistics": {
            name: _file_identity(spec.statistics)
            for name, spec in plan.recipe.experts.items()
            if spec.statistics is not None
        },
    }
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _file_identity(path: str) -> list[int]:
    status = Path(path).stat()
    return [status.st_size, status.st_mtime_ns]


class Journal:
    """An append-only file of finished jobs beside an unfinished output; locked while in use."""

    durable = True

    def __init__(self, folder: Path, identity: str) -> None:
        """Open or continue the journal in a run's folder, which is created.

        Raises:
            ResumeError: the folder is not a run's own, or its run had another request.
            RequestError: another process is writing there.
            OutputError: the folder cannot be written.
        """
        self.path = folder / JOURNAL
        self.finished: dict[tuple[str, str], Finished] = {}
        try:
            if folder.exists() and any(folder.iterdir()) and not self.path.exists():
                raise ResumeError(
                    f"{folder} exists and is not an unfinished merge.\n"
                    "Move it away, or choose another output."
                )
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"another process is merging into {folder}.") from None
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror}.") from None
        self.resumed = self._read(identity)

    def _read(self, identity: str) -> bool:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        torn = lines.pop()  # after the last newline: empty, or a line cut short by a kill
        if torn:
            self._file.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            self._append({"eutectic_journal": 1, "identity": identity})
            return False
        if json.loads(lines[0]).get("identity") != identity:
            self.close()
            raise ResumeError(
                f"{self.path.parent} holds an unfinished merge of another request: the recipe, an "
                "input or the version has changed since.\n"
                "Repeat the earlier command to finish it, or start over with --restart."
            )
        for line in lines[1:]:
            item = json.loads(line)
            key = (item["stage"], item["tensor"])
            self.finished[key] = Finished(item["sha256"], item["norm"], item["record"])
        return True

    def add(self, stage: str, tensor: str, finished: Finished) -> None:
        """Note a finished job; the line is handed to the system before this returns."""
        self.finished[stage, tensor] = finished
        self._append({"stage": stage, "tensor": tensor, **vars(finished)})

    def _append(self, item: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(item).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}.") from None

    def close(self) -> None:
        """Close the file and release the lock."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
