"""The unfinished state of a collection on disk, so that a killed one can go on."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from eutectic.errors import (
    OutputError,
    ResumeError,
    StatisticsError,
    first_line,
    why_failed,
)
from eutectic.statistics.statistics_file import lock_output
from eutectic.statistics.tensor_file import TensorFile, write_tensors
from eutectic.storage import Lock, storage_of
from eutectic.words import shown

_KEY = "eutectic_collection"
_SNAPSHOT = "snapshot.safetensors"
_PASS = "pass-{:04d}.safetensors"
_A_PASS = re.compile(r"pass-\d{4,}\.safetensors")


@dataclass
class DataLog:
    """Which examples were seen.

    `inputs` has a hash per example, without labels: two collections with a common hash overlap;
    `batches` the running hash after each batch, labels included.
    """

    inputs: list[int] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)

    def chain(self, index: int, everything: list[int]) -> str:
        """Return the running hash after batch `index`, which holds these examples."""
        before = self.batches[index - 1] if index else ""
        return hashlib.sha256(f"{before}\0{everything}".encode()).hexdigest()


@dataclass(frozen=True)
class Snapshot:
    """Where a collection stood: the pass, the batches done in it, the running sums, the data."""

    part: int
    batches: int
    sums: Mapping[str, Tensor]
    log: DataLog


class _Stood(BaseModel):
    """What the record of a snapshot says."""

    model_config = ConfigDict(strict=True)

    part: Annotated[int, Field(ge=0)]
    batches: Annotated[int, Field(ge=0)]
    log: list[str]


def _damaged(path: Path, error: Exception) -> ResumeError:
    return ResumeError(
        f"{path}: damaged ({first_line(error)}).\nRemove {path.parent} to start anew."
    )


@dataclass(frozen=True)
class Partial:
    """The folder `<output>.partial` of one collection.

    `snapshot.safetensors` holds the running sums of the current pass in full precision,
    `pass-<n>.safetensors` what a finished pass gave. `device` is the model of the accelerator that
    runs the collected model, empty for the CPU: another one rounds otherwise.
    """

    folder: Path
    identity: str
    lock: Lock  # of the output
    device: str = ""

    def save(self, snapshot: Snapshot) -> None:
        """Replace the snapshot."""
        examples = torch.tensor(snapshot.log.inputs, dtype=torch.int64)
        record = {"part": snapshot.part, "batches": snapshot.batches, "log": snapshot.log.batches}
        self._write(_SNAPSHOT, {**snapshot.sums, "examples": examples}, record)

    def load(self) -> Snapshot | None:
        """Return the snapshot, or None when the collection had not come to one."""
        file = self._read(_SNAPSHOT)
        if file is None:
            return None
        try:
            stood = _Stood.model_validate(file.record)
            log = DataLog(file["examples"].tolist(), stood.log)
        except (KeyError, ValueError) as error:
            raise _damaged(file.path, error) from error
        sums = {name: file[name] for name in file if name != "examples"}
        return Snapshot(stood.part, stood.batches, sums, log)

    def save_pass(
        self, part: int, tensors: Mapping[str, Tensor], counts: Mapping[str, Any]
    ) -> None:
        """Keep what a finished pass gave."""
        self._write(_PASS.format(part), tensors, {"counts": dict(counts)})

    def load_pass(self, part: int) -> tuple[Mapping[str, Tensor], dict[str, Any]] | None:
        """Return what a pass gave, read when asked for, or None when it is not finished."""
        file = self._read(_PASS.format(part))
        if file is None:
            return None
        counts = file.record.get("counts")
        if not isinstance(counts, dict):
            raise _damaged(file.path, ValueError("'counts' is no object"))
        return file, counts

    def _write(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        write_tensors(self.folder / name, tensors, _KEY, {**self._stamp, **record})

    def _read(self, name: str) -> TensorFile | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            file = TensorFile(path, _KEY)
        except StatisticsError as error:
            raise ResumeError(f"{error}\nRemove {self.folder} to start anew.") from error
        if file.record.get("identity") != self.identity:
            begun = file.record.get("device", "")
            if begun != self.device:
                raise ResumeError(
                    f"{self.folder}: the unfinished collection in it was begun on "
                    f"{shown(begun) if begun else 'the CPU'}, and this one runs on "
                    f"{self.device or 'the CPU'}: sums of both would be those of neither.\n"
                    "Repeat it with the --device it was begun on, or remove the folder to start "
                    "anew."
                )
            raise ResumeError(
                f"{self.folder}: the unfinished collection in it has another model or other "
                "settings.\n"
                "Repeat that one with its own arguments, or remove the folder to start anew."
            )
        return file

    @property
    def _stamp(self) -> dict[str, str]:
        """Return what every file says of the collection that it belongs to."""
        return {"identity": self.identity, **({"device": self.device} if self.device else {})}

    def remove(self) -> None:
        """Delete the folder with all that a collection keeps there; this one is finished."""
        storage = storage_of(self.folder)
        names = [name for name in storage.list(self.folder) if _is_own(name)]
        storage.discard(self.folder, names)

    def remove_if_empty(self) -> None:
        """Delete the folder of a collection that failed before there was anything to keep."""
        storage_of(self.folder).discard(self.folder, ())


def _is_own(name: str) -> bool:
    return name == _SNAPSHOT or _A_PASS.fullmatch(name) is not None


def open_partial(output: Path, identity: str, device: str = "") -> Partial:
    """Create or take up the folder beside `output`, which nobody else may write from here on."""
    folder = output.with_name(f"{output.name}.partial")
    lock = lock_output(output)
    try:
        return _opened(Partial(folder, identity, lock, device))
    except BaseException:
        lock.release()
        raise


def _opened(partial: Partial) -> Partial:
    folder = partial.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = storage_of(folder).list(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created ({why_failed(error)}).") from error
    strangers = [name for name in names if not _is_own(name)]
    if strangers:
        raise ResumeError(
            f"{folder}: holds '{strangers[0]}', which was not written by `collect`.\n"
            "Choose another output, or remove the folder."
        )
    partial.load()
    return partial
