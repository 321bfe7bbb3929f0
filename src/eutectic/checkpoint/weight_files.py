"""Which files of a folder are the checkpoint, by their names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eutectic.checkpoint.gguf_file import SUFFIX as GGUF_SUFFIX
from eutectic.checkpoint.names import check_inside, check_plain_name
from eutectic.checkpoint.odd_files import is_pointer, pointer, start_of
from eutectic.checkpoint.odd_folders import by_names, is_piece, unfinished
from eutectic.errors import CheckpointError
from eutectic.storage import storage_of
from eutectic.storage.small_files import CONFIG_BYTES, INDEX_BYTES, read_json
from eutectic.words import few

PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
ADAPTER_CONFIG = "adapter_config.json"
INDEX_SUFFIX = ".index.json"
# Files that training scripts and PEFT leave beside the weights.
_NOT_WEIGHTS = (
    *("adapter_model", "optimizer", "scheduler", "scaler", "rng_state", "training_args"),
    *("lr_scheduler", "random_states", "sampler", "pytorch_adapter", "model_optim_rng"),
)
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)")
# What Mistral puts beside the files that transformers reads: the same weights under other names.
_SECOND_COPY = "consolidated"


@dataclass(frozen=True)
class Shards:
    """A complete set of shards that no index lists."""

    names: tuple[str, ...]


def weights_in(folder: Path) -> str | Shards:
    """Return the weight file or index of a folder, or shards that lie there without an index.

    Safetensors win over torch pickles; a file name that transformers writes wins over a lone file
    of any other name. CheckpointError says what the folder is where it holds no weights to read.
    """
    names = names_in(folder)
    if (found := unfinished(folder, names)) is not None:
        raise found.error(folder)
    for own in ([n for n in names if not n.startswith(_SECOND_COPY)], names):
        for usual, suffixes in (
            ("model.safetensors", (".safetensors",)),
            ("pytorch_model.bin", PICKLE_SUFFIXES),
            ("model.gguf", (GGUF_SUFFIX,)),
        ):
            if (chosen := _choose(folder, own, usual, suffixes)) is not None:
                return chosen
    raise _nothing(folder, names)


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder but the hidden ones."""
    try:
        return [name for name in storage_of(folder).list(folder) if not name.startswith(".")]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}).") from error


def holds_weights(names: Sequence[str]) -> bool:
    """Tell whether a folder with these names has a file that may be a full checkpoint."""
    return any(is_full_weights(n, (*WEIGHT_SUFFIXES, INDEX_SUFFIX)) for n in names)


def holds_adapter(names: Sequence[str]) -> bool:
    """Tell whether a folder with these names is a PEFT adapter."""
    return ADAPTER_CONFIG in names and any(n.startswith("adapter_model.") for n in names)


def read_json_object(
    path: Path, *, limit: int = CONFIG_BYTES, unique: bool = False
) -> dict[str, Any]:
    """Return the JSON object in a file; for `limit` and `unique` see `storage.small_files`."""
    try:
        if is_pointer(start_of(path)):
            raise pointer(path.parent).error(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    return read_json(path, CheckpointError, limit=limit, unique=unique)


def weight_map(folder: Path, name: str) -> dict[str, str]:
    """Return tensor -> file of the index `name`; the files are plain names."""
    check_inside(folder, name)
    table = read_json_object(folder / name, limit=INDEX_BYTES, unique=True).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{folder / name}: 'weight_map' must map tensors to files.")
    for tensor, file in table.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{folder / name}: the file of '{tensor}' is not a string.")
        check_plain_name(file, str(folder / name))
    return table


def check_whole(path: Path) -> None:
    """Refuse a file that the user named and that its name calls a piece of the weights."""
    match = _SHARD.fullmatch(path.name)
    if match is not None and int(match["count"]) > 1:
        raise CheckpointError(
            f"{path}: one of {int(match['count'])} shards, a part of the weights.\n"
            f"Name the folder instead: {path.parent}"
        )


def is_full_weights(name: str, endings: tuple[str, ...] = WEIGHT_SUFFIXES) -> bool:
    """Tell whether a file may hold all weights, or a shard or index of them, by its name."""
    return name.endswith(endings) and not name.startswith(_NOT_WEIGHTS) and not is_piece(name)


def _choose(
    folder: Path, names: Sequence[str], usual: str, suffixes: tuple[str, ...]
) -> str | Shards | None:
    """Return the weight file, index or shards of one format; None where there are none."""
    usual_index = usual + INDEX_SUFFIX
    known = [name for name in (usual, usual_index) if name in names]
    if len(known) == 2 and set(weight_map(folder, usual_index).values()) != {usual}:
        raise CheckpointError(
            f"{folder}: holds both {usual} and {usual_index}, which names other files.\n"
            "One of them is stale. Remove it, or name the file you mean instead of the folder."
        )
    if known:
        return known[0]
    indices = [n for n in names if is_full_weights(n, tuple(s + INDEX_SUFFIX for s in suffixes))]
    files = [n for n in names if is_full_weights(n, suffixes)]
    for found in (indices, files):
        if found is files and (shards := _shards(folder, found)) is not None:
            return shards
        if len(found) > 1:
            listed = "\n".join(f"  {folder / name}" for name in found[:6])
            raise CheckpointError(
                f"{folder}: several files could be the checkpoint: {few(found, 6)}.\n"
                f"Name the file you mean instead of the folder:\n{listed}"
            )
        if found:
            return found[0]
    return None


def _shards(folder: Path, names: Sequence[str]) -> str | Shards | None:
    """Return the shards of one set; CheckpointError where some of it are missing."""
    sets: dict[tuple[str, int, str], dict[int, str]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            key = (match["stem"], int(match["count"]), match["suffix"])
            sets.setdefault(key, {})[int(match["number"])] = name
    if len(sets) != 1 or len(names) != len(next(iter(sets.values()))):
        return None  # none, or among other files: then there are several checkpoints
    ((_, count, _), found), *_ = sets.items()
    first = 0 if 0 in found else 1
    if lacking := [i for i in range(first, first + count) if i not in found]:
        raise CheckpointError(
            f"{folder}: holds {len(found)} of {count} shards; "
            f"{'number' if len(lacking) == 1 else 'numbers'} {few([*map(str, lacking)], 8)} "
            f"{'is' if len(lacking) == 1 else 'are'} missing.\nComplete the download."
        )
    ordered = tuple(found[i] for i in sorted(found))
    return Shards(ordered) if count > 1 else ordered[0]


def _nothing(folder: Path, names: Sequence[str]) -> CheckpointError:
    """Return the error of a folder without weights, which says what it holds instead."""
    if holds_adapter(names):
        trained = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        known = f" ({trained})" if isinstance(trained, str) and trained else ""
        return CheckpointError(
            f"{folder}: this is a PEFT adapter, not a full checkpoint.\n"
            f"It can be an expert; the base must be the model it was trained on{known}."
        )
    if (found := by_names(folder, names)) is not None:
        return CheckpointError(f"{folder}: no weights found: {found.what}.\n{found.next}")
    below = [
        f"{folder / name}: {inner.what}. {inner.next}"
        for name in names
        if (folder / name).is_dir()
        if (inner := by_names(folder / name, names_in(folder / name))) is not None
    ]
    if below:
        return CheckpointError(f"{folder}: no weights found.\n" + "\n".join(below[:3]))
    return CheckpointError(
        f"{folder}: no weights found (it holds: {few(names, 8)}).\nExpected model.safetensors, "
        "pytorch_model.bin, their sharded forms with an index, or a single .safetensors, .bin or "
        ".pt file."
    )
