"""The journal of a run: which tensors are finished, with what bytes, of which request."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from eutectic.checkpoint.folder import deciding_files
from eutectic.checkpoint.reader import file_identity
from eutectic.errors import OutputError, RequestError, ResumeError, why_failed
from eutectic.execution.norms import Squares
from eutectic.execution.tasks import Finished
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.storage import AppendedFile, local_path, storage_of
from eutectic.storage.small_files import parse_json
from eutectic.versions import version
from eutectic.words import few

# All that a run keeps in its work folder.
JOURNAL = "journal.jsonl"
MODEL = "model"  # the output, until it is complete
DELTAS = "deltas.safetensors"
PARTS = "parts"  # of an adapter, one file a tensor
_FORMAT = 2
_FILE = "file"  # the stage of lines that name a file of the model, before it is made
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


def squares_in(ledger: Ledger) -> dict[str, Squares]:
    """Return tensor -> how large its change is, for tensors that a method merged."""
    return {
        tensor: done.squares
        for (stage, tensor), done in ledger.finished.items()
        if stage == "merge" and done.squares
    }


def request_identity(
    plan: Plan, inputs: Inputs, known: Mapping[str, Any] | None = None, device: str = ""
) -> str:
    """Return a hash of all that decides the output's bytes: recipe, decisions, inputs, version.

    So does the model of the device that matrices are merged on (`Device.model`). Inputs count by
    name, size and time of change of their files, and by a sample of their content, as
    `input_identities` has found them.
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
        "inputs": input_identities(plan, inputs) if known is None else known,
    }
    if device:
        described["device"] = device
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def input_identities(plan: Plan, inputs: Inputs) -> dict[str, Any]:
    """Return what every input is known by: files' names, sizes and times of change, and samples.

    Asked of the files anew each time, so that an input that changes in the meantime shows.
    """
    found = weight_identities(plan, inputs)
    for name, folder in _copied_from(plan, inputs).items():
        beside = file_identity(folder, [*deciding_files(folder)])
        found[f"configuration or tokenizer of {name}"] = beside
    return found


def weight_identities(plan: Plan, inputs: Inputs) -> dict[str, Any]:
    """Return the same of what is merged alone, without the files that are copied beside it."""
    found: dict[str, Any] = {"the base": [inputs.base.fingerprint(), inputs.base.identity()]}
    for name, expert in inputs.experts.items():
        found[f"expert '{name}'"] = [expert.fingerprint(), expert.identity()]
    if inputs.initial is not None:
        found["init"] = [inputs.initial.fingerprint(), inputs.initial.identity()]
    for name, path in plan.request.statistics_files.items():
        file = local_path(path)
        found[f"the statistics of '{name}'"] = file_identity(file.parent, [file.name])
    return found


def _copied_from(plan: Plan, inputs: Inputs) -> dict[str, Path]:
    """Return the folders whose side files the output gets, when all tensors are written."""
    donor = inputs.experts.get(plan.output.side_files)
    folders = {f"expert '{name}'": inputs.experts[name].folder for name in plan.heads}
    if donor is not None:
        folders[f"expert '{plan.output.side_files}'"] = donor.folder
    alone = donor is not None and donor.folder and (donor.folder / "config.json").is_file()
    if inputs.index is not None and (plan.heads or not alone):
        folders["the base"] = inputs.index.folder
    return {name: folder for name, folder in folders.items() if folder is not None}


class _Line(BaseModel):
    """A line of a journal: a finished task, and what it gave."""

    model_config = ConfigDict(strict=True, extra="forbid")

    stage: str
    tensor: str
    sha256: str
    record: dict[str, Any]
    norms: dict[str, float]
    squares: dict[str, list[float]] = {}


class Journal(Ledger):
    """An append-only file of finished jobs beside an unfinished output; locked while in use."""

    durable = True

    def __init__(self, folder: Path, identity: str, *, restart: bool = False) -> None:
        """Open or continue a run's journal; `restart` empties the folder, if it is a run's own."""
        super().__init__()
        self.path = folder / JOURNAL
        self._lock = threading.Lock()
        self._lists_files = True  # unless an earlier version wrote it, or lines of it are lost
        self._storage = storage_of(folder)
        self._file: AppendedFile | None = None
        try:
            names = self._storage.list(folder)
            strangers = [name for name in names if name not in (JOURNAL, MODEL, DELTAS, PARTS)]
            if names and (strangers or not self.path.exists()):
                why = f" It holds '{strangers[0]}'." if strangers else ""
                raise ResumeError(
                    f"{folder} exists and is not an unfinished merge.{why}\n"
                    "Move it away, or choose another output."
                )
            self._owned = self._storage.lock(folder)
            try:
                self._check_owner()
                if restart:  # while the lock is held: nobody's running merge is deleted
                    left = self._discard()
                    if left and self.path.exists():
                        raise self._not_ours([n.removeprefix(f"{MODEL}/") for n in left])
                self._file = self._storage.append(self.path)
                self.resumed = self._read(identity)
            except BaseException:
                self.close()
                raise
        except BlockingIOError:
            raise RequestError(f"another process is merging into {folder}.") from None
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {why_failed(error)}.") from None

    def _check_owner(self) -> None:
        """Refuse a folder that no merge has made.

        A run begins its journal before anything else, so an empty one stands alone.
        """
        found = self.path.read_bytes() if self.path.exists() else b""
        others = [name for name in self._storage.list(self.path.parent) if name != JOURNAL]
        begun = found[: len(_HEADER)]
        if not _HEADER.startswith(begun) or (others and begun != _HEADER):
            raise ResumeError(f"{self.path} is not the journal of a merge.\nMove it away.")

    def _discard(self) -> Sequence[str]:
        """Remove the folder with all that a run keeps there; return what else it holds."""
        folder = self.path.parent
        begun = self.path.exists() and self._storage.list(folder / MODEL)
        if begun and (known := self._listed()):
            self._storage.discard(folder / MODEL, sorted(known))
            if left := self._storage.files_below(folder / MODEL):
                return [f"{MODEL}/{name}" for name in left]
        # The journal goes last: without it, the rest would pass for somebody else's.
        return self._storage.discard(folder, (MODEL, DELTAS, PARTS, JOURNAL))

    def _listed(self) -> frozenset[str]:
        """Return the files of the model that the journal names."""
        found: set[str] = set()
        for line in self.path.read_bytes().splitlines():
            with suppress(ValueError):
                item = _Line.model_validate(parse_json(line))
                found.update([item.tensor] if item.stage == _FILE else [])
        return frozenset(found)

    def will_write(self, file: Path) -> None:
        """Note that a file of the model is about to be made; refuse one that no run has made."""
        model = self.path.parent / MODEL
        if not file.is_relative_to(model):
            return
        name = file.relative_to(model).as_posix()
        if (_FILE, name) not in self.finished:
            if self._lists_files and self._storage.identity(file) is not None:
                raise self._not_ours([name])
            self.add(_FILE, name, Finished("", {}, {}))

    def own(self, names: Iterable[str]) -> None:
        """Note files of the model that are known by what they hold, there or not."""
        for name in names:
            if (_FILE, name) not in self.finished:
                self.add(_FILE, name, Finished("", {}, {}))

    def check_files(self) -> None:
        """Refuse files in the model's folder that no run has made: they would be published."""
        held = self._storage.files_below(self.path.parent / MODEL) if self._lists_files else ()
        if strangers := [name for name in held if (_FILE, name) not in self.finished]:
            raise self._not_ours(strangers)

    def _not_ours(self, names: Sequence[str]) -> ResumeError:
        return ResumeError(
            f"{self.path.parent / MODEL} holds {few(names)}, which no merge wrote.\n"
            "Move it away, then run the same command again; nothing is lost."
        )

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
        lost = 0
        for line in lines[1:]:
            # A line that the disk lost, such as one of zeros after a power cut, costs its tensor.
            try:
                item = _Line.model_validate(parse_json(line))
            except ValueError:
                lost += 1
                continue
            done = Finished(item.sha256, item.record, item.norms, item.squares)
            self.finished[item.stage, item.tensor] = done
        listed = any(stage == _FILE for stage, _ in self.finished) or len(lines) == 1
        self._lists_files = listed and not lost
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
            raise OutputError(f"cannot write {self.path}: {why_failed(error)}.") from None

    def remove_folder(self) -> str | None:
        """Remove the run's folder while the lock is held; the run is finished.

        Return why something of it is left, if it is: what the run has made stands all the same.
        """
        self._close_file()  # first: network file systems keep a file that is open
        self._owned.leave_nothing()  # then: a kill in between leaves a run that can be finished
        try:
            try:
                left = self._discard()
            except OSError:
                left = self._discard()  # what failed once need not fail again
        except OSError as error:
            return why_failed(error)
        return f"it holds '{left[0]}', which no merge wrote" if left else None

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
