"""The files of a folder: which of them are its weights, and what else lies there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eutectic.checking.report import Finding
from eutectic.checkpoint.folder import check_side_files
from eutectic.checkpoint.header import TensorEntry, looks_like_safetensors, read_header
from eutectic.checkpoint.index import CheckpointIndex, open_index
from eutectic.checkpoint.names import check_inside
from eutectic.checkpoint.odd_files import pointer, pointers_among
from eutectic.checkpoint.odd_folders import unfinished_among
from eutectic.checkpoint.pickles import read_pickle
from eutectic.checkpoint.reader import CheckpointReader
from eutectic.checkpoint.weight_files import (
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    WEIGHT_SUFFIXES,
    is_full_weights,
    names_in,
    read_json_object,
    weight_map,
)
from eutectic.errors import CheckpointError, Fault, Note
from eutectic.storage import storage_of
from eutectic.storage.small_files import INDEX_BYTES
from eutectic.words import few

_ENDINGS = (*WEIGHT_SUFFIXES, INDEX_SUFFIX)


def file_findings(folder: Path, index: CheckpointIndex | None) -> Iterator[Finding]:
    """Yield what is wrong or unusual with the files of a folder.

    `index` is the table of its checkpoint, None where that cannot be opened or is an adapter's.
    """
    names = [name for name in names_in(folder) if not (folder / name).is_dir()]
    present = [name for name in names if (folder / name).is_file()]
    for name in sorted({*names} - {*present}):
        yield Fault("no_file", "a link that leads nowhere, or no regular file.", name)
    if found := pointers_among(folder, present):
        oddity = pointer(folder, found)
        yield Fault("lfs_pointer", f"{folder}: {oddity.what}.", next=oddity.next)
    used = () if index is None else index.weight_files
    yield from _empty(folder, [name for name in present if name not in found])
    if left := unfinished_among(folder, names):
        yield Note("unfinished_download", tuple(left), level="warning")
    try:
        check_side_files(folder)
    except CheckpointError as error:
        if not found:
            yield Fault("side_file", str(error))
    for name in used:
        try:
            check_inside(folder, name)
        except CheckpointError as error:
            yield Fault("outside", str(error))
    if index is not None:
        yield from _beside(folder, index, [n for n in present if n not in found])
        yield from _size_stated(folder, index)
    else:
        yield from _each_readable(folder, [n for n in present if n not in found])


def _empty(folder: Path, names: Sequence[str]) -> Iterator[Finding]:
    """Yield files of no bytes, and weight files without a tensor."""
    storage = storage_of(folder)
    for name in names:
        identity = storage.identity(folder / name)
        if identity is not None and identity[0] == 0:
            if is_full_weights(name, _ENDINGS):
                yield Fault(
                    "empty_file", "an empty file (0 bytes).", name, next="Download it again."
                )
            else:
                yield Note("empty_file", (name,), level="warning")
        elif name.endswith(".safetensors"):
            try:
                tensors = read_header(folder / name, name).tensors
            except CheckpointError:
                continue  # told where it is read
            if not any(entry.numel for entry in tensors):
                yield Note("empty_shard", (name,), {"count": len(tensors)}, "warning")


def _each_readable(folder: Path, names: Sequence[str]) -> Iterator[Finding]:
    """Yield every weight file that cannot be read, where the checkpoint as a whole cannot."""
    for name in names:
        size, _ = storage_of(folder).identity(folder / name) or (0, 0)
        if size and name.endswith(WEIGHT_SUFFIXES):
            try:
                _tensors_of(folder, name)
            except CheckpointError as error:
                yield Fault("unreadable", str(error))


def _tensors_of(folder: Path, name: str) -> dict[str, TensorEntry]:
    """Return the tensors in one weight file, a shard or not; only its header is read."""
    path = folder / name
    if name.endswith(".safetensors") or looks_like_safetensors(path):
        return {entry.name: entry for entry in read_header(path, name).tensors}
    table = read_pickle(path)
    return {
        key: TensorEntry(key, v.dtype, tuple(v.shape), name, table.offset(key), 0)
        for key, v in table.tensors.items()
    }


def _beside(folder: Path, index: CheckpointIndex, names: Sequence[str]) -> Iterator[Finding]:
    """Yield weight files that are not the checkpoint's: stale ones, and copies of it."""
    used = {*index.weight_files}
    indices = {n: _listed(folder, n) for n in names if n.endswith(INDEX_SUFFIX) and n not in used}
    for name, files in indices.items():
        lacking = [file for file in files if not (folder / file).is_file()]
        if lacking or not files:
            yield Note("stale_index", (name,), {"files": few(lacking) or "no file"}, "warning")
    others = [n for n in names if n not in used and is_full_weights(n, WEIGHT_SUFFIXES)]
    if not others:
        return
    copies, strays = list[str](), list[str]()
    sets = {name: files for name, files in indices.items() if {*files} <= {*others}}
    for name, files in sets.items():
        (copies if _is_copy(folder, name, index) else strays).extend([*files])
    for name in others:
        if name not in copies and name not in strays:
            (copies if _is_copy(folder, name, index) else strays).append(name)
    read = few(sorted(index.files))
    if strays:
        yield Note("stale_weights", tuple(sorted(strays)), {"read": read}, "warning")
    if copies:
        yield Note("second_copy", tuple(sorted(copies)), {"read": read})


def _listed(folder: Path, name: str) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(weight_map(folder, name).values()))
    except CheckpointError:
        return ()


def _is_copy(folder: Path, name: str, index: CheckpointIndex) -> bool:
    """Tell whether another file, or index, holds the same tensors as far as samples tell."""
    try:
        if name.endswith(INDEX_SUFFIX):
            other = open_index(folder / name)
        else:
            tensors = _tensors_of(folder, name)
            if {n: e.shape for n, e in tensors.items()} != _shapes(index.entries):
                return False
            other = replace(index, entries=tensors, files=(name,), weight_index=None, modules=())
        if _shapes(other.entries) != _shapes(index.entries):
            return False
        with CheckpointReader(other) as copy, CheckpointReader(index) as own:
            return copy.fingerprint() == own.fingerprint()
    except CheckpointError:
        return False


def _shapes(entries: Mapping[str, TensorEntry]) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in entries.items()}


def _size_stated(folder: Path, index: CheckpointIndex) -> Iterator[Finding]:
    """Yield an index whose total size is not that of its tensors."""
    if index.weight_index is None:
        return
    said = read_json_object(folder / index.weight_index, limit=INDEX_BYTES).get("metadata")
    stated: Any = said.get("total_size") if isinstance(said, Mapping) else None
    held = sum(entry.nbytes for entry in index.entries.values())
    pickled = any(file.endswith(PICKLE_SUFFIXES) for file in index.files)
    if isinstance(stated, int) and stated and stated != held and not pickled:
        numbers = {"stated": stated, "held": held}
        yield Note("index_total", (index.weight_index,), numbers)


def tensors_of_pickles(index: CheckpointIndex) -> Iterator[Finding]:
    """Yield what a user should know of weights in torch's own format."""
    others = () if index.gguf is not None else index.files
    pickled = [f for f in others if not looks_like_safetensors(index.folder / f)]
    if pickled:
        yield Note("pickled", tuple(pickled))
    if index.skipped:
        yield Note("other_entries", index.skipped)


def held_bytes(entries: Mapping[str, TensorEntry]) -> int:
    """Return the bytes of tensors as they are stored."""
    return sum(entry.nbytes for entry in entries.values())
