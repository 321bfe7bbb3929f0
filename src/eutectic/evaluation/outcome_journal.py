"""Finished (checkpoint, task) pairs, one JSON line each, in a file beside the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from eutectic.errors import OutputError, RequestError, ResumeError
from eutectic.evaluation.metrics import Outcomes
from eutectic.storage import AppendedFile, Lock, storage_of

SUFFIX = ".outcomes.jsonl"


class Journal:
    """Outcomes by the identity of what made them; appended to and locked while in use.

    A pair whose checkpoint, head, data or settings changed has another identity, so it is computed
    again; the old line stays. The file holds the outcome of every row, for further tests.
    """

    def __init__(self, output: Path | None) -> None:
        """Open or create the journal of a results file; None keeps outcomes in memory only."""
        self._found: dict[str, Outcomes] = {}
        self._file: AppendedFile | None = None
        self._owned: Lock | None = None
        if output is None:
            return
        path = output.with_name(output.name + SUFFIX)
        storage = storage_of(path)
        try:
            self._owned = storage.lock(path)
            self._file = storage.append(path)
            self._read(path)
        except BlockingIOError:
            raise RequestError(f"another process is evaluating into {output}.") from None
        except OSError as error:
            self.close()
            raise OutputError(f"{path}: cannot be written ({error.strerror or error}).") from None
        except BaseException:
            self.close()
            raise

    def _read(self, path: Path) -> None:
        assert self._file is not None
        lines = self._file.read().splitlines(keepends=True)
        # A kill may cut the last line short.
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        try:
            for line in lines:
                item = json.loads(line)
                self._found[item["pair"]] = Outcomes(
                    np.array(item["predictions"], dtype=np.float64),
                    np.array(item["references"], dtype=np.float64),
                )
        except (ValueError, KeyError, TypeError):
            raise ResumeError(
                f"{path} is not a journal of evaluations.\nMove it away, or choose another output."
            ) from None
        self._file.cut(sum(map(len, lines)))

    def get(self, pair: str) -> Outcomes | None:
        """Return the outcomes of a finished pair."""
        return self._found.get(pair)

    def add(self, pair: str, checkpoint: str, task: str, outcomes: Outcomes) -> None:
        """Note a finished pair; the line is handed to the system before this returns."""
        self._found[pair] = outcomes
        if self._file is None:
            return
        item: dict[str, Any] = {
            "pair": pair,
            "checkpoint": checkpoint,
            "task": task,
            "predictions": outcomes.predictions.tolist(),
            "references": outcomes.references.tolist(),
        }
        line = json.dumps(item).encode() + b"\n"
        try:
            self._file.append(line)
        except OSError as error:
            raise OutputError(f"the journal cannot be written ({error.strerror}).") from None

    def close(self) -> None:
        """Close the file and release the lock."""
        if self._file is not None:
            self._file.close()
        if self._owned is not None:
            self._owned.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
