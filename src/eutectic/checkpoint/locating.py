"""What a path or the name of a model means: a folder, one below it, or a model of the hub.

Trainers put checkpoints one level down (`checkpoint-500/`), PEFT puts named adapters there
(`other/`), people put a model into `final/`. Where the folder itself holds nothing to read and one
folder below it does, that is meant; where several do, the user chooses.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eutectic.checkpoint.gguf_file import SUFFIX as GGUF_SUFFIX
from eutectic.checkpoint.hub import HubId, download, hub_id, is_offline, listed_on_hub, no_folder
from eutectic.checkpoint.module_folders import MODULES_NAME
from eutectic.checkpoint.odd_files import command
from eutectic.checkpoint.odd_folders import by_names, unfinished
from eutectic.checkpoint.weight_files import (
    ADAPTER_CONFIG,
    WEIGHT_SUFFIXES,
    holds_adapter,
    holds_weights,
    names_in,
)
from eutectic.errors import CheckpointError, Note
from eutectic.storage import Url, is_url, meant, url_of, view
from eutectic.words import few

# Other formats of the weights, and what is no model: never descended into unasked.
_ASIDE = re.compile(
    r"original|onnx|openvino|coreml|runs|logs|wandb|global_step\d+|iter_\d+|optimizer(_\d+)?"
    r"|pytorch_model_fsdp_\d+|mp_rank_\d+.*|__pycache__"
)
_STEP = re.compile(r"checkpoint-\d+")
_SHOWN = 20


@dataclass(frozen=True)
class Located:
    """Where a model lies."""

    path: Path
    below: str | None = None  # what to type for it, where it lies one level below what was named
    others: tuple[str, ...] = ()  # what to type for further adapters below an adapter

    def notes(self, who: str) -> list[Note]:
        """Return what a user should know of it; `who` is the base or an expert."""
        found = [] if self.below is None else [Note("one_level_down", (who, self.below))]
        if self.others:
            found.append(Note("further_adapters", self.others, {"who": who}))
        return found


def resolve(path_or_id: str | Path, *, revision: str | None = None) -> Path:
    """Return a local folder or file for a path, or for the name of a model on the hub."""
    return locate(path_or_id, revision=revision).path


def locate(path_or_id: str | Path, *, revision: str | None = None, full: bool = False) -> Located:
    """Return where a model lies: a path, or a name on the hub as `hub_id` understands it.

    A URL of a store is looked at there; only small files are fetched (`storage.view`). An existing
    path wins over an id. A folder that holds nothing to read stands for the one folder below it
    that does (with `full`, the one that holds a full checkpoint); CheckpointError lists them where
    there are several.
    """
    text = str(path_or_id)
    url = url_of(path_or_id)
    if url is not None and url.scheme == "hf" and is_offline():
        text, url = url.path, None  # what the hub's own cache holds
    if url is not None or is_url(text):
        return _in_store(url, text, full)
    path = Path(text).expanduser()
    if text and path.exists():
        return _in_folder(path, text, full) if path.is_dir() else _of_file(path)
    found = hub_id(text, revision)
    if found is None or path.suffix in (*WEIGHT_SUFFIXES, GGUF_SUFFIX):
        raise CheckpointError(
            f"'{text}': no such file or folder, and not a model on the hub either "
            f"('name', 'org/name', 'org/name@revision', 'org/name/folder').{meant(path)}"
        )
    folder = download(found)
    if _kind(names_in(folder)) is None and (below := listed_on_hub(found)):
        chosen = _chosen(below, str(found), full)
        if chosen is not None:
            inner = found.below(chosen)
            return Located(download(inner), str(inner))
        _refuse_unfit(found, folder, below.get("", ()))
    if not folder.is_dir():
        raise no_folder(found)
    return _in_folder(folder, str(found), full)


def _in_store(url: Url | None, text: str, full: bool) -> Located:
    path = view(text if url is None else str(url))
    shown = str(path) if url is None else str(url)
    if not path.exists():
        raise CheckpointError(f"{shown}: there is nothing of that name.\nCheck the spelling.")
    if not path.is_dir():
        return _of_file(path)
    found = _in_folder(path, shown, full)
    if found.path != path:
        view(found.path)  # less is fetched of a folder below than of one that is named
    return found


def _of_file(path: Path) -> Located:
    """Return the adapter's folder where its weights were named, else the file itself."""
    adapter = path.name.startswith("adapter_model.") and (path.parent / ADAPTER_CONFIG).is_file()
    return Located(path.parent if adapter else path)


def _in_folder(folder: Path, shown: str, full: bool) -> Located:
    names = names_in(folder)
    if unfinished(folder, names) is not None:
        return Located(folder)  # opening it says what it is
    kind = _kind(names)
    if kind == "adapter" and not full:
        others = [
            n for n in names if not _STEP.fullmatch(n) and _kind(_names_below(folder, n)) == kind
        ]
        return Located(folder, others=tuple(_typed(shown, name) for name in others))
    if kind is not None or ADAPTER_CONFIG in names:
        return Located(folder)
    below = {"": names, **{n: _names_below(folder, n) for n in names}}
    chosen = _chosen(below, shown, full)
    if chosen is None:
        return Located(folder)
    return Located(folder / chosen, _typed(shown, chosen))


def _names_below(folder: Path, name: str) -> list[str]:
    """Return the names in a folder in `folder`; none where it leads out of it or is no folder."""
    inner = folder / name
    inside = inner.is_dir() and inner.resolve().is_relative_to(folder.resolve())
    if not inside or not os.access(inner, os.R_OK | os.X_OK):
        return []
    return names_in(inner)


def _kind(names: Sequence[str]) -> str | None:
    if holds_adapter(names):
        return "adapter"
    return "checkpoint" if holds_weights(names) or MODULES_NAME in names else None


def _chosen(below: Mapping[str, Sequence[str]], shown: str, full: bool) -> str | None:
    """Return the one folder that holds something to read, None where none does.

    `below` has the names in each folder one level down, under "" those beside the folders. A
    pipeline of diffusers is more than one of its parts.
    """
    if "model_index.json" in below.get("", ()):
        return None
    kinds = {n: _kind(names) for n, names in below.items() if n and not _ASIDE.fullmatch(n)}
    found = {name: kind for name, kind in kinds.items() if kind is not None}
    if full and "checkpoint" in found.values():
        found = {name: kind for name, kind in found.items() if kind == "checkpoint"}
    if len(found) > 1:
        ordered = sorted(found, key=_by_number)
        listed = [f"  {_typed(shown, name)}  ({found[name]})" for name in ordered[:_SHOWN]]
        if len(ordered) > _SHOWN:
            listed.append(f"  and {len(ordered) - _SHOWN} more")
        raise CheckpointError(
            f"{shown}: holds no weights itself, but {len(found)} folders below it do.\n"
            "Name the one you mean:\n" + "\n".join(listed)
        )
    return next(iter(found), None)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a key that puts checkpoint-900 before checkpoint-1000."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _typed(shown: str, name: str) -> str:
    return f"{shown.rstrip('/')}/{name}"


def _refuse_unfit(wanted: HubId, folder: Path, names: Sequence[str]) -> None:
    """Say what a model of the hub is of which nothing to read was fetched, by the names there."""
    if holds_weights(names):
        place = f"{wanted.folder}/" if wanted.folder else ""
        files = [place + name for name in names if name.endswith(WEIGHT_SUFFIXES)]
        here = command("hf", "download", wanted.model, *files[:1], "--local-dir", "FOLDER")
        raise CheckpointError(
            f"{wanted}: of its files ({few(files)}) none has a name that is fetched unasked.\n"
            f"Download the one you mean, and name it: {here}"
        )
    if names and (found := by_names(folder, names)) is not None:
        raise found.error(wanted)
