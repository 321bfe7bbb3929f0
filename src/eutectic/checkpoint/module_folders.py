"""Checkpoints in several folders: the modules of sentence-transformers, by their `modules.json`.

The first module (a transformer, mostly) lies in the folder itself or in `0_Transformer/`, others in
folders such as `2_Dense/`; a Router (earlier Asym) has a folder for every module of its routes. All
modules with weights make one table of tensors: those of the first module under their own names,
those of the others behind the name of their folder ("2_Dense.linear.weight").
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from eutectic.checkpoint.names import check_inside, is_plain_name
from eutectic.errors import CheckpointError
from eutectic.storage.small_files import read_json
from eutectic.words import shown

MODULES_NAME = "modules.json"
# Of a Router; the second is that of its predecessor Asym.
ROUTER_CONFIGS = ("router_config.json", "config.json")
_MAX_MODULES = 1000


@dataclass(frozen=True)
class ModuleFolder:
    """One module of a checkpoint in several folders."""

    folder: str  # relative to the checkpoint's, "" where it is that itself
    prefix: str  # what the names of its tensors begin with in the table of the checkpoint
    transformer: bool = False  # transformers reads it, in shards too
    weight_index: str | None = None  # name of its `*.index.json` in the checkpoint's folder

    def file(self, name: str) -> str:
        """Return the name of a file of the module, relative to the checkpoint's folder."""
        return f"{self.folder}/{name}" if self.folder else name


def module_folders(path: Path) -> tuple[ModuleFolder, ...]:
    """Return the modules that a folder's `modules.json` names; none where there is no such file.

    CheckpointError where one lies outside of the folder.
    """
    listed = path / MODULES_NAME
    if not listed.is_file():
        return ()
    found: list[ModuleFolder] = []
    for number, stated in enumerate(_stated(path, MODULES_NAME, list)):
        own = cast("Mapping[str, Any]", stated) if isinstance(stated, Mapping) else {}
        folder = _checked(own.get("path"), listed)
        routed = list(_routes(path, folder, "" if number == 0 else f"{folder}/"))
        found += routed or [_module(path, folder, f"{folder}." if number else "")]
        if len(found) > _MAX_MODULES:
            raise CheckpointError(f"{listed}: names more than {_MAX_MODULES} modules.")
    home = path.resolve()
    for module in found:
        if not (path / module.folder).resolve().is_relative_to(home):
            raise CheckpointError(
                f"{path / module.folder} is a link that leads out of its folder.\n"
                "Refused: a checkpoint may not read files elsewhere."
            )
    twice = [m.folder for m in found if sum(m.folder == other.folder for other in found) > 1]
    if twice:
        raise CheckpointError(f"{listed}: two modules have the folder '{twice[0]}'.")
    return tuple(found)


def _routes(path: Path, folder: str, above: str) -> Iterator[ModuleFolder]:
    """Yield the modules of a Router; nothing where the folder holds another module.

    Asym called folders by random numbers, so names of tensors say route, position and class. A
    module of several routes is that of the first.
    """
    for name in ROUTER_CONFIGS:
        where = f"{folder}/{name}" if folder else name
        stated = _stated(path, where, dict) if (path / where).is_file() else {}
        types, structure = stated.get("types"), stated.get("structure")
        if not isinstance(types, Mapping) or not isinstance(structure, Mapping):
            continue
        seen: set[str] = set()
        for route, modules in cast("Mapping[str, Any]", structure).items():
            for position, own in enumerate(modules if isinstance(modules, list) else []):
                inner = _checked(own, path / where)
                if inner in seen:
                    continue
                seen.add(inner)
                kind = str(cast("Mapping[str, Any]", types).get(inner)).rpartition(".")[2]
                place = f"{folder}/{inner}" if folder else inner
                yield _module(path, place, f"{above}{route}_{position}_{kind}.")
        return


def _module(path: Path, folder: str, prefix: str) -> ModuleFolder:
    where = f"{folder}/config.json" if folder else "config.json"
    config = _stated(path, where, dict) if (path / where).is_file() else {}
    return ModuleFolder(folder, prefix, "model_type" in config)


def _checked(folder: object, where: Path) -> str:
    """Return a module's folder, which must lie below that of the file that names it."""
    parts = folder.split("/") if isinstance(folder, str) and folder else []
    if not isinstance(folder, str) or len(parts) > 8 or not all(map(is_plain_name, parts)):
        raise CheckpointError(
            f"{where} names the folder {shown(folder)}, which is not a plain path below its own.\n"
            "Refused: a checkpoint may not read files elsewhere."
        )
    return folder


def _stated(path: Path, name: str, kind: type) -> Any:
    """Return the content of a JSON file below a checkpoint's folder, a list or an object."""
    real = check_inside(path, name)
    return read_json(real, CheckpointError, kind=kind)
