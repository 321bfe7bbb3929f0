"""The unfinished state of a calibration on disk: a file for every layer that is finished."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from eutectic.errors import (
    OutputError,
    RequestError,
    ResumeError,
    StatisticsError,
    why_failed,
)
from eutectic.statistics.tensor_file import TensorFile, write_tensors
from eutectic.storage import Lock, WrittenFiles, storage_of

MODEL = "model"  # the folder of the output, in the work folder until it is complete
_LIST = "written.jsonl"  # of that folder's files
_KEY = "eutectic_calibration"
_LAYER = "layer-{:05d}.safetensors"
_A_LAYER = re.compile(r"layer-\d{5,}\.safetensors")


@dataclass
class Unfinished:
    """The folder `<output>.partial`: finished layers in order, and later the output's folder.

    `layers` has name of the place -> (new tensors by file key, what is reported of it).
    """

    folder: Path
    identity: str
    lock: Lock
    layers: dict[str, tuple[Mapping[str, Tensor], dict[str, Any]]] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        """Where the output is written before it gets its name."""
        return self.folder / MODEL

    @property
    def written(self) -> WrittenFiles:
        """Which of its files calibrations have made."""
        return _written(self.folder)

    def add(self, place: str, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
        """Keep a finished layer; it outlives the process when this returns."""
        path = self.folder / _LAYER.format(len(self.layers))
        kept = {"identity": self.identity, "place": place, "record": record}
        write_tensors(path, tensors, _KEY, kept)
        # From there, so that finished layers take no memory.
        self.layers[place] = (TensorFile(path, _KEY), record)

    def remove(self) -> None:
        """Delete the folder with all that a calibration keeps there; this one is finished."""
        self.lock.leave_nothing()
        _discard(self.folder)


def _discard(folder: Path) -> None:
    """Remove what a calibration keeps in its work folder, and the folder if it holds no more."""
    storage = storage_of(folder)
    # The first layer goes last: by it, the rest is known to be a calibration's.
    layers = [name for name in storage.list(folder) if _A_LAYER.fullmatch(name)]
    if not _written(folder).discard():
        storage.discard(folder, (_LIST, *reversed(layers)))


def _written(folder: Path) -> WrittenFiles:
    return WrittenFiles(folder / MODEL, folder / _LIST, storage_of(folder))


def _is_own(folder: Path) -> bool:
    """Tell whether a folder holds nothing but what calibrations write."""
    names = storage_of(folder).list(folder)
    if not names:
        return True
    if any(name not in (MODEL, _LIST) and not _A_LAYER.fullmatch(name) for name in names):
        return False
    try:  # the output is begun when all layers are there
        TensorFile(folder / _LAYER.format(0), _KEY)
    except (StatisticsError, OSError):
        return False
    return True


def open_unfinished(folder: Path, identity: str, *, restart: bool) -> Unfinished:
    """Create the work folder, or take up what a killed run left in it; `restart` empties it."""
    storage = storage_of(folder)
    try:
        if not _is_own(folder):
            raise ResumeError(
                f"{folder} exists and is not an unfinished calibration.\n"
                "Move it away, or choose another output."
            )
        lock = storage.lock(folder)
        try:
            _written(folder).check()
            if restart:
                _discard(folder)
            folder.mkdir(parents=True, exist_ok=True)
            found = Unfinished(folder, identity, lock)
            _read(found)
            storage.remove(found.model)  # quickly written again
            storage.remove(folder / _LIST)
            return found
        except BaseException:
            lock.release()
            raise
    except BlockingIOError:
        raise RequestError(f"another process is calibrating into {folder}.") from None
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {why_failed(error)}.") from None


def _read(unfinished: Unfinished) -> None:
    while (path := unfinished.folder / _LAYER.format(len(unfinished.layers))).exists():
        try:
            file = TensorFile(path, _KEY)
        except StatisticsError as error:
            raise ResumeError(f"{error}\nRemove {unfinished.folder} to start anew.") from error
        if file.record.get("identity") != unfinished.identity:
            raise ResumeError(
                f"{unfinished.folder} holds an unfinished calibration of another request: "
                "a checkpoint, the data, a setting or the version has changed since.\n"
                "Repeat the earlier command to finish it, or start over with --restart."
            )
        place, record = file.record.get("place"), file.record.get("record")
        if not (isinstance(place, str) and isinstance(record, dict)):
            raise ResumeError(f"{path}: damaged.\nRemove {unfinished.folder} to start anew.")
        unfinished.layers[place] = (file, cast("dict[str, Any]", record))
