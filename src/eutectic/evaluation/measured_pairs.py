"""The journal of an evaluation: each finished pair of checkpoint and task, with its outcomes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from eutectic.errors import OutputError, RequestError, ResumeError, why_failed
from eutectic.evaluation.metrics import Outcomes
from eutectic.storage import AppendedFile, storage_of
from eutectic.storage.small_files import parse_json

SUFFIX = ".outcomes.jsonl"
_LINE = b'{"pair": "'  # how each begins


@dataclass(frozen=True)
class Journal:
    """Outcomes by the identity of what made them, and the file that keeps them, one JSON line each.

    A pair whose checkpoint, head, data or settings changed is computed again; the old line stays.
    """

    found: dict[str, Outcomes]
    file: AppendedFile | None = None

    def add(self, pair: str, checkpoint: str, task: str, outcomes: Outcomes) -> None:
        """Note a finished pair; the line is handed to the system before this returns."""
        self.found[pair] = outcomes
        if self.file is None:
            return
        item: dict[str, Any] = {
            "pair": pair,
            "checkpoint": checkpoint,
            "task": task,
            "predictions": outcomes.predictions.tolist(),
            "references": outcomes.references.tolist(),
        }
        try:
            self.file.append(json.dumps(item).encode() + b"\n")
        except OSError as error:
            raise OutputError(f"the journal cannot be written ({why_failed(error)}).") from None


@contextmanager
def open_journal(output: Path | None) -> Iterator[Journal]:
    """Open or create the journal of a results file, locked; None keeps outcomes in memory only."""
    if output is None:
        yield Journal({})
        return
    path = output.with_name(output.name + SUFFIX)
    with ExitStack() as opened:
        try:
            opened.callback(storage_of(path).lock(path).release)
            file = storage_of(path).append(path)
            opened.callback(file.close)
            journal = Journal(_finished(file, path), file)
        except BlockingIOError:
            raise RequestError(f"another process is evaluating into {output}.") from None
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({why_failed(error)}).") from None
        yield journal


class _Line(BaseModel):
    """A line of the journal."""

    model_config = ConfigDict(strict=True)

    pair: str
    predictions: list[Any]
    references: list[Any]


def _finished(file: AppendedFile, path: Path) -> dict[str, Outcomes]:
    lines = file.read().splitlines(keepends=True)
    # A kill may cut the last line short, and leaves its beginning.
    if lines and not lines[-1].endswith(b"\n"):
        torn = lines.pop()
        if not (torn.startswith(_LINE) or _LINE.startswith(torn)):
            lines.append(torn)
    found: dict[str, Outcomes] = {}
    for line in lines:
        # A line that the disk lost costs its pair, which is computed again.
        with suppress(ValueError):
            item = _Line.model_validate(parse_json(line))
            arrays = (np.array(a, dtype=np.float64) for a in (item.predictions, item.references))
            found[item.pair] = Outcomes(*arrays)
    if lines and not found:
        raise ResumeError(
            f"{path} is not a journal of evaluations.\nMove it away, or choose another output."
        ) from None
    file.cut(sum(map(len, lines)))
    return found
