"""Opening the weights of any checkpoint: what is quantised is seen as the numbers that it means."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eutectic.checkpoint.index import CheckpointIndex, open_index, read_json_object
from eutectic.checkpoint.quantised.reader import QuantisedReader, QuantisedTensors
from eutectic.checkpoint.quantised.recognition import Recognised, recognise, stated_by
from eutectic.checkpoint.reader import (
    CheckpointReader,
    CheckpointSource,
    StateDictReader,
    TensorSource,
)
from eutectic.errors import Note


def open_reader(path: Path | CheckpointIndex) -> CheckpointSource:
    """Return the reader of the checkpoint at `path`: a folder, one weight file, or an open index.

    Quantised tensors appear under their logical names, in the dtype that the checkpoint states,
    and are dequantised as they are read; what belongs to them is hidden, and `index` agrees. A
    plain checkpoint's reader is a `CheckpointReader`. CheckpointError where tensors are codes that
    cannot be read exactly: nothing that looks like codes is passed on as numbers.
    """
    index = path if isinstance(path, CheckpointIndex) else open_index(path)
    reader = CheckpointReader(index)
    if index.gguf is not None:
        kinds = index.gguf.kinds
        notes = (Note("dequantised", numbers={"kinds": dict(kinds)}),) if kinds else ()
        return QuantisedReader(reader, Recognised(index.gguf.codes, frozenset(), notes))
    try:
        found = recognise(reader.entries, index.config, reader.read, str(path_of(index)))
    except BaseException:
        reader.close()
        raise
    if not (found.codes or found.hidden or found.notes):
        return reader
    return QuantisedReader(reader, found)


def logical_index(path: Path) -> CheckpointIndex:
    """Return the table of a checkpoint's logical tensors; see `open_reader`."""
    with open_reader(path) as reader:
        return reader.index


def is_stated_quantised(folder: Path) -> bool:
    """Tell whether a folder's configuration says that its weights are quantised."""
    config = folder / "config.json"
    return config.is_file() and bool(stated_by(read_json_object(config)).settings)


def path_of(index: CheckpointIndex) -> Path:
    """Return what a user would name to open a checkpoint: its folder, or its only file."""
    if index.gguf is not None and len(index.files) == 1:
        return index.folder / index.files[0]
    whole = index.weight_index is not None or index.config
    return index.folder if whole else index.folder / index.files[0]


def logical_tensors(
    source: StateDictReader, config: Mapping[str, Any] | None = None
) -> TensorSource:
    """Return a state dict with its quantised tensors dequantised, itself where there are none."""
    found = recognise(source.entries, config or {}, source.read, source.label)
    return QuantisedTensors(source, found, source.label) if found.codes else source
