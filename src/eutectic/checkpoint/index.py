"""The table of a checkpoint's tensors, from headers only."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eutectic.checkpoint.header import TensorEntry, read_header
from eutectic.checkpoint.module_folders import MODULES_NAME, ModuleFolder, module_folders
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
    modules: tuple[ModuleFolder, ...] = ()  # those with weights, of a checkpoint in several folders

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
    a lone file of any other name. Of safetensors only the headers are read. CheckpointError where
    a header or an index lies or leads out of the folder, or a pickle holds code.

    Of a checkpoint in several folders (see `module_folders`) the tables of all are one.
    """
    path = Path(path)
    modules = modules_with_weights(path) if path.is_dir() else ()
    if not modules:
        return _open_one(path)
    return _joined(path, {module: _open_one(path / module.folder) for module in modules})


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
    names = storage_of(folder).list(folder) if folder.is_dir() else ()
    return any(
        n.endswith(WEIGHT_SUFFIXES) and not n.startswith((".", *_NOT_WEIGHTS)) for n in names
    )


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
        modules=kept,
    )


def _open_one(path: Path) -> CheckpointIndex:
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
