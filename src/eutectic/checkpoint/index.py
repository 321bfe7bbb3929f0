"""The table of a checkpoint's tensors, from headers only."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eutectic.checkpoint.header import TensorEntry, read_header
from eutectic.checkpoint.names import check_inside, check_plain_name
from eutectic.checkpoint.pickles import load_pickle
from eutectic.errors import CheckpointError
from eutectic.storage import storage_of

PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
# Files that training scripts and PEFT leave beside the weights.
_NOT_WEIGHTS = ("adapter_model", "optimizer", "scheduler", "scaler", "rng_state", "training_args")
_INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class CheckpointIndex:
    """The tensors of one checkpoint and the files that hold them."""

    folder: Path  # as the user named it
    entries: Mapping[str, TensorEntry]  # in the order of files and of offsets within them
    files: tuple[str, ...]  # weight files relative to the folder, in order
    weight_index: str | None = None  # name of the `*.index.json` of a sharded checkpoint
    metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # by safetensors file
    config: Mapping[str, Any] = field(default_factory=dict)  # {} where there is no config.json
    skipped: tuple[str, ...] = ()  # "name (type)" of what is no tensor in torch pickles


def open_index(path: Path) -> CheckpointIndex:
    """Return the table of the checkpoint at `path`: a folder, or one weight file.

    In a folder, safetensors win over torch pickles; a file name that transformers writes wins over
    a lone file of any other name. Of safetensors only the headers are read. CheckpointError where
    a header or an index lies or leads out of the folder, or a pickle holds code.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder.")
    if path.is_dir():
        folder, name = path, _weights_in(path)
    else:
        folder, name = path.parent, path.name
        if not name.endswith((*WEIGHT_SUFFIXES, _INDEX_SUFFIX)):
            raise CheckpointError(
                f"{path}: not a weight file.\nKnown endings: .safetensors, "
                f"{', '.join(PICKLE_SUFFIXES)}, {_INDEX_SUFFIX}."
            )
    config = read_json_object(folder / "config.json") if (folder / "config.json").exists() else {}
    if name.endswith(_INDEX_SUFFIX):
        return _sharded(folder, name, config)
    # A file that the user named himself may be a link to anywhere; one found in a folder may not.
    real = check_inside(folder, name) if path.is_dir() else path
    entries, metadata, skipped = _read_file(real, name)
    table = {entry.name: entry for entry in entries}
    return CheckpointIndex(folder, table, (name,), None, {name: metadata}, config, skipped)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds {type(value).__name__}.")
    return value


def _weights_in(folder: Path) -> str:
    try:
        names = [name for name in storage_of(folder).list(folder) if not name.startswith(".")]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}).") from error
    found = _choose(folder, names, "model.safetensors", (".safetensors",))
    if found := found or _choose(folder, names, "pytorch_model.bin", PICKLE_SUFFIXES):
        return found
    if "adapter_config.json" in names:
        raise CheckpointError(
            f"{folder}: this is a PEFT adapter, not a full checkpoint.\n"
            "It can be an expert; the base must be the model it was trained on."
        )
    raise CheckpointError(
        f"{folder}: no weights found.\nExpected model.safetensors, pytorch_model.bin, their "
        "sharded forms with an index, or a single .safetensors, .bin or .pt file."
    )


def _choose(
    folder: Path, names: Sequence[str], usual: str, suffixes: tuple[str, ...]
) -> str | None:
    """Return the weight file or index of one format; None where there is none."""
    usual_index = usual + _INDEX_SUFFIX
    known = [name for name in (usual, usual_index) if name in names]
    if len(known) == 2 and set(_weight_map(folder, usual_index).values()) != {usual}:
        raise CheckpointError(
            f"{folder}: holds both {usual} and {usual_index}, which names other files.\n"
            "One of them is stale. Remove it, or name the file you mean instead of the folder."
        )
    if known:
        return known[0]
    for endings in (tuple(suffix + _INDEX_SUFFIX for suffix in suffixes), suffixes):
        found = [n for n in names if n.endswith(endings) and not n.startswith(_NOT_WEIGHTS)]
        if len(found) > 1:
            raise CheckpointError(
                f"{folder}: several files could be the checkpoint: {', '.join(found[:6])}.\n"
                "Name the file you mean instead of the folder."
            )
        if found:
            return found[0]
    return None


def _weight_map(folder: Path, name: str) -> dict[str, str]:
    check_inside(folder, name)
    weight_map = read_json_object(folder / name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / name}: 'weight_map' must map tensors to files.")
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{folder / name}: the file of '{tensor}' is not a string.")
        check_plain_name(file, str(folder / name))
    return weight_map


def _sharded(folder: Path, name: str, config: Mapping[str, Any]) -> CheckpointIndex:
    weight_map = _weight_map(folder, name)
    files = tuple(sorted(set(weight_map.values())))
    if absent := [file for file in files if not (folder / file).exists()]:
        raise CheckpointError(
            f"{folder}: {name} names {len(absent)} of {len(files)} files that are missing: "
            f"{', '.join(absent[:5])}.\nComplete the download."
        )
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    skipped: list[str] = []
    for file in files:
        listed, metadata[file], others = _read_file(check_inside(folder, file), file)
        skipped.extend(others)
        for entry in listed:
            if (elsewhere := weight_map.get(entry.name)) != file:
                what = f"says it is in {elsewhere}" if elsewhere else "does not list it"
                raise CheckpointError(
                    f"{folder}: {file} holds the tensor '{entry.name}', but {name} {what}.\n"
                    "The shards belong to different checkpoints, or the index is stale; "
                    "save the model again."
                )
            entries[entry.name] = entry
    if lost := [tensor for tensor in weight_map if tensor not in entries]:
        raise CheckpointError(
            f"{folder}: {name} lists {len(lost)} tensors that the files do not hold: "
            f"{', '.join(lost[:5])}.\nThe index is stale or a shard is damaged."
        )
    return CheckpointIndex(folder, entries, files, name, metadata, config, tuple(skipped))


def _read_file(
    path: Path, name: str
) -> tuple[Sequence[TensorEntry], Mapping[str, str], tuple[str, ...]]:
    """Return a file's tensors, its metadata, and what else a pickle holds."""
    if name.endswith(".safetensors"):
        header = read_header(path, name)
        return header.tensors, header.metadata, ()
    tensors, skipped = load_pickle(path)
    entries = [
        TensorEntry(key, t.dtype, tuple(t.shape), name, -1, t.nbytes) for key, t in tensors.items()
    ]
    return entries, {}, skipped
