"""What the record of a statistics file must say: the boundary to files from elsewhere."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eutectic.checkpoint.stated import wrong
from eutectic.errors import StatisticsError
from eutectic.words import plain

_Count = Annotated[int, Field(ge=0)]
_Sizes = Annotated[list[_Count], Field(max_length=64)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class LayerRecord(_Part):
    """What is said of one parameter."""

    count: _Count
    sample_count: _Count
    inputs: str  # the parameter whose inputs are the same
    same_as: str
    shape: _Sizes  # empty for a scalar
    parameter: _Sizes


class DataRecord(_Part):
    """Which data were seen."""

    examples: _Count = 0


class CheckpointRecord(_Part):
    """On which checkpoint."""

    fingerprint: str


class AdapterRecord(_Part):
    """One adapter that statistics were collected for."""

    name: str
    fingerprint: str


class CoreRecord(_Part):
    """For which adapters."""

    adapters: list[AdapterRecord]
    ranks: dict[str, _Sizes]
    base_names: dict[str, str]


class SettingsRecord(_Part):
    """How they were collected; most of it is for people."""

    core: CoreRecord | None = None


class FileRecord(_Part):
    """The whole record; keys that are not named here are for people."""

    data: DataRecord
    checkpoint: CheckpointRecord
    settings: SettingsRecord
    layers: dict[str, LayerRecord]
    unseen: list[str] = []
    skipped: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    saved_as: dict[str, str] = {}


def check_record(record: Any, path: Path) -> None:
    """Raise StatisticsError where a record is not what a collection writes."""
    try:
        layers = FileRecord.model_validate(record).layers
    except ValidationError as fault:
        place = fault.errors(include_url=False)[0]["loc"]
        raise _senseless(path, [str(part) for part in place], wrong(fault)) from None
    for name, layer in layers.items():
        for key in ("inputs", "same_as"):
            if getattr(layer, key) not in layers:
                raise _senseless(path, ["layers", name], f"'{key}' names no layer")


def _senseless(path: Path, place: list[str], why: str) -> StatisticsError:
    what = f"its record is incomplete ({place[0]})"
    if place[0] == "layers" and len(place) > 1:
        what = f"what it says about '{plain(place[1])[:200]}' makes no sense"
    return StatisticsError(
        f"{path}: {what}: {why}.\n"
        "The file was not written by eutectic; collect the statistics again."
    )
