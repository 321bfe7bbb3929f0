"""The table of a checkpoint's tensors, from headers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eutectic.checkpoint.gguf_file import SUFFIX as GGUF_SUFFIX
from eutectic.checkpoint.gguf_file import GgufHeader, read_gguf
from eutectic.checkpoint.header import TensorEntry, looks_like_safetensors, read_header
from eutectic.checkpoint.module_folders import MODULES_NAME, ModuleFolder, module_folders
from eutectic.checkpoint.names import check_inside
from eutectic.checkpoint.odd_adapters import by_keys
from eutectic.checkpoint.odd_folders import by_names
from eutectic.checkpoint.pickles import looks_like_pickle, read_pickle
from eutectic.checkpoint.weight_files import (
    INDEX_SUFFIX,
    PICKLE_SUFFIXES,
    WEIGHT_SUFFIXES,
    Shards,
    check_whole,
    holds_weights,
    names_in,
    read_json_object,
    weight_map,
    weights_in,
)
from eutectic.conventions import adapter_keys
from eutectic.errors import CheckpointError, Note
from eutectic.storage import meant
from eutectic.words import few

if TYPE_CHECKING:
    from eutectic.checkpoint.quantised.gguf import GgufTable

__all__ = [
    "PICKLE_SUFFIXES",
    "WEIGHT_SUFFIXES",
    "CheckpointIndex",
    "TensorEntry",
    "open_index",
    "read_json_object",
]

_ADAPTER_FILE = "adapter_model."


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
    notes: tuple[Note, ...] = ()  # what is unusual in its files
    modules: tuple[ModuleFolder, ...] = ()  # those with weights, of a checkpoint in several folders
    gguf: GgufTable | None = None  # what the entries mean, where the files are GGUF

    def module_of(self, file: str) -> ModuleFolder:
        """Return the module that a weight file belongs to; the checkpoint itself where it is one.

        A tensor's key in the file is its name without the module's prefix.
        """
        folder = file.rpartition("/")[0]
        found = next((m for m in self.modules if m.folder == folder), None)
        return found or ModuleFolder("", "", transformer=True, weight_index=self.weight_index)

    @property
    def main(self) -> ModuleFolder:
        """The module whose names have no prefix, or else the first."""
        found = next((m for m in self.modules if not m.prefix), None)
        return found or (self.modules[0] if self.modules else self.module_of(""))

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Names of the weight files and of their indices."""
        indices = [self.weight_index, *(module.weight_index for module in self.modules)]
        return (*self.files, *dict.fromkeys(name for name in indices if name))

    @property
    def config_files(self) -> tuple[str, ...]:
        """Names of the files, there or not, that say how the tensors are read."""
        configs = [module.file("config.json") for module in self.modules]
        return (MODULES_NAME, *configs) if self.modules else ("config.json",)


def open_index(path: Path) -> CheckpointIndex:
    """Return the table of the checkpoint at `path`: a folder, or one weight file.

    In a folder, safetensors win over torch pickles; a file name that transformers writes wins over
    a lone file of any other name. Of safetensors only the headers are read, and a file's content
    decides its format, not its ending. CheckpointError where a header or an index lies or leads
    out of the folder, or a pickle holds code.

    Of a checkpoint in several folders (see `module_folders`) the tables of all are one.
    """
    path = Path(path)
    modules = modules_with_weights(path) if path.is_dir() else ()
    if not modules:
        return _open_one(path)
    return _joined(path, {module: _open_one(path / module.folder) for module in modules})


def open_adapter_index(weights: Path) -> CheckpointIndex:
    """Return the table of an adapter's file and of the modules beside it that have weights.

    sentence-transformers saves a trained adapter of its transformer so, and all of a Dense.
    """
    index, folder = open_index(weights), weights.parent
    beside = [m for m in module_folders(folder) if m.prefix and _holds_weights(folder / m.folder)]
    if not beside:
        return index
    others = {module: _open_one(folder / module.folder) for module in beside}
    return _joined(folder, {ModuleFolder("", "", transformer=True): index, **others})


def modules_with_weights(path: Path) -> tuple[ModuleFolder, ...]:
    """Return the modules of a checkpoint in several folders; none where it lies in one."""
    found = [module for module in module_folders(path) if _holds_weights(path / module.folder)]
    if not any(module.folder for module in found):
        return ()
    if all(module.folder for module in found) and _holds_weights(path):
        raise CheckpointError(
            f"{path}: holds weights beside {MODULES_NAME}, which names those in "
            f"{found[0].folder}/.\nOne of them is stale. Remove it, or name the file you mean "
            "instead of the folder."
        )
    return tuple(found)


def _holds_weights(folder: Path) -> bool:
    return folder.is_dir() and holds_weights(names_in(folder))


def _joined(path: Path, modules: Mapping[ModuleFolder, CheckpointIndex]) -> CheckpointIndex:
    """Return one table of the tensors of all modules."""
    entries: dict[str, TensorEntry] = {}
    for module, index in modules.items():
        for key, entry in index.entries.items():
            named = replace(entry, name=module.prefix + key, file=module.file(entry.file))
            if named.name in entries:
                raise CheckpointError(f"{path}: two modules hold a tensor '{named.name}'.")
            entries[named.name] = named
    kept = tuple(
        replace(m, weight_index=m.file(index.weight_index) if index.weight_index else None)
        for m, index in modules.items()
    )
    configs = [index.config for module, index in modules.items() if module.transformer]
    return CheckpointIndex(
        path,
        entries,
        tuple(module.file(file) for module, index in modules.items() for file in index.files),
        next((module.weight_index for module in kept if not module.prefix), None),
        {m.file(file): said for m, i in modules.items() for file, said in i.metadata.items()},
        configs[0] if configs else {},
        tuple(told for index in modules.values() for told in index.skipped),
        notes=tuple(note for index in modules.values() for note in index.notes),
        modules=kept,
    )


def _open_one(path: Path) -> CheckpointIndex:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder.{meant(path)}")
    found: str | Shards
    if path.is_dir():
        folder, found = path, weights_in(path)
    else:
        folder, found = path.parent, path.name
        if not found.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX, GGUF_SUFFIX)):
            if (other := by_names(folder, [found])) is not None:
                raise CheckpointError(f"{path}: not a weight file: {other.what}.\n{other.next}")
            raise CheckpointError(
                f"{path}: not a weight file.\nKnown endings: .safetensors, "
                f"{', '.join(PICKLE_SUFFIXES)}, {INDEX_SUFFIX}."
            )
        check_whole(path)
    config = read_json_object(folder / "config.json") if (folder / "config.json").exists() else {}
    named = found.names if isinstance(found, Shards) else (found,)
    if all(name.endswith(GGUF_SUFFIX) for name in named):
        real = path if path.is_file() else None
        return _gguf(folder, named, config, real)
    if isinstance(found, Shards):
        index = _unlisted(folder, found.names, config)
    elif found.endswith(INDEX_SUFFIX):
        index = _sharded(folder, found, config)
    else:
        # A file that the user named himself may be a link to anywhere; one found in a folder not.
        real = check_inside(folder, found) if path.is_dir() else path
        entries, metadata, skipped, notes = _read_file(real, found)
        table = {entry.name: entry for entry in entries}
        files = (found,)
        index = CheckpointIndex(
            folder, table, files, None, {found: metadata}, config, skipped, notes
        )
    _refuse_oddities(index)
    return index


def _gguf(
    folder: Path, names: Sequence[str], config: Mapping[str, Any], real: Path | None
) -> CheckpointIndex:
    """Return the table of GGUF files; the settings of several stand in the first."""
    from eutectic.checkpoint.quantised.gguf import joined, table_of

    paths = [real or check_inside(folder, name) for name in names]
    headers = [read_gguf(path) for path in paths]
    settings = headers[0].settings
    table = joined(
        [
            table_of(GgufHeader(settings, header.tensors), path, name)
            for header, path, name in zip(headers, paths, names, strict=True)
        ]
    )
    entries = {entry.name: entry for entry in table.entries}
    stated = config or table.config
    return CheckpointIndex(folder, entries, tuple(names), config=stated, gguf=table)


def _refuse_oddities(index: CheckpointIndex) -> None:
    """Refuse tables that are no weights of a model, whatever their file is called."""
    where = index.folder / index.files[0]
    alone = len(index.files) == 1 and not index.files[0].startswith(_ADAPTER_FILE)
    if alone and (kind := adapter_keys(index.entries)) is not None:
        raise by_keys(where, kind).error(where)


def _unlisted(folder: Path, names: Sequence[str], config: Mapping[str, Any]) -> CheckpointIndex:
    """Return the table of shards that no index lists: all of them are there, by their names."""
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    skipped: list[str] = []
    notes = [Note("shards_without_index", numbers={"count": len(names)})]
    for name in names:
        listed, metadata[name], others, told = _read_file(check_inside(folder, name), name)
        if twice := [entry for entry in listed if entry.name in entries]:
            raise CheckpointError(
                f"{folder}: {name} and {entries[twice[0].name].file} both hold "
                f"{few([entry.name for entry in twice])}, and no index says which counts.\n"
                "The shards belong to different checkpoints; save the model again."
            )
        entries.update((entry.name, entry) for entry in listed)
        skipped += others
        notes += told
    return CheckpointIndex(
        folder, entries, tuple(names), None, metadata, config, tuple(skipped), tuple(notes)
    )


def _sharded(folder: Path, name: str, config: Mapping[str, Any]) -> CheckpointIndex:
    listed_in = weight_map(folder, name)
    files = tuple(sorted(set(listed_in.values())))
    if absent := [file for file in files if not (folder / file).exists()]:
        raise CheckpointError(
            f"{folder}: {name} names {len(absent)} of {len(files)} files that are missing: "
            f"{few(absent, 5)}.\nComplete the download."
        )
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    skipped: list[str] = []
    notes: list[Note] = []
    for file in files:
        listed, metadata[file], others, told = _read_file(check_inside(folder, file), file)
        skipped.extend(others)
        notes.extend(told)
        if strays := [entry.name for entry in listed if listed_in.get(entry.name) != file]:
            elsewhere = listed_in.get(strays[0])
            what = f"says it is in {elsewhere}" if elsewhere else "does not list it"
            more = f" (and {len(strays) - 1} more such tensors)" if len(strays) > 1 else ""
            raise CheckpointError(
                f"{folder}: {file} holds the tensor '{strays[0]}', but {name} {what}{more}.\n"
                "The shards belong to different checkpoints, or the index is stale; "
                "save the model again."
            )
        entries.update((entry.name, entry) for entry in listed)
    if lost := [tensor for tensor in listed_in if tensor not in entries]:
        raise CheckpointError(
            f"{folder}: {name} lists {len(lost)} tensors that the files do not hold: "
            f"{few(lost, 5)}.\nThe index is stale or a shard is damaged."
        )
    index = CheckpointIndex(folder, entries, files, name, metadata, config)
    return replace(index, skipped=tuple(skipped), notes=tuple(notes))


_File = tuple[Sequence[TensorEntry], Mapping[str, str], tuple[str, ...], tuple[Note, ...]]


def _read_file(path: Path, name: str) -> _File:
    """Return a file's tensors, its metadata, what else a pickle holds, and what is to be told."""
    ending = name.endswith(".safetensors")
    notes: tuple[Note, ...] = ()
    safe = ending
    if ending and looks_like_pickle(path) and not looks_like_safetensors(path):
        safe, notes = False, (_other_ending(name, "a torch pickle"),)
    elif not ending and looks_like_safetensors(path):
        safe, notes = True, (_other_ending(name, "safetensors"),)
    if safe:
        header = read_header(path, name)
        return header.tensors, header.metadata, (), notes
    table = read_pickle(path)
    if table.wrapper:
        told = {"file": name, "name": table.wrapper, "others": len(table.others)}
        notes = (*notes, Note("wrapped_weights", numbers=told))
    entries = [
        TensorEntry(key, t.dtype, t.shape, name, table.offset(key), t.numel() * t.dtype.itemsize)
        for key, t in table.tensors.items()
    ]
    return entries, {}, table.others, notes


def _other_ending(file: str, format: str) -> Note:
    return Note("other_ending", numbers={"file": file, "format": format})
