"""How mergekit names a model: a path or hub id, with a revision and an adapter on top of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from eutectic.errors import Fault
from eutectic.recipes.document import Source, exists, inside
from eutectic.recipes.paths import is_local, named
from eutectic.storage import is_url

_UNFIT = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class MergekitModel:
    """A model as a configuration names it; two are the same if all of it is."""

    path: str
    adapter: str | None = None
    shown: str = field(default="", compare=False)  # as it was written

    def __str__(self) -> str:
        return self.shown or self.path


_NONE: Mapping[str, str] = {}


def read_model(
    value: object, source: Source, stages: Mapping[str, str] = _NONE
) -> MergekitModel | Fault:
    """Return the model that a text, or a mapping with `model`, `lora` and their revisions, names.

    Local paths start at the recipe's folder, or else at the working directory, as in mergekit. A
    name in `stages` is that of another document of the file, whose output lies there.
    """
    found = _read(value, source)
    if isinstance(found, MergekitModel) and (path := stages.get(found.shown.partition("+")[0])):
        return replace(found, path=path)
    return found


def _read(value: object, source: Source) -> MergekitModel | Fault:
    if isinstance(value, str):
        return _of_text(value, source)
    if isinstance(value, Mapping):
        given = cast("Mapping[str, Any]", value)
        if unknown := [k for k in given if k not in ("model", "lora", "override_architecture")]:
            return Fault("unknown_key", f"unknown key '{unknown[0]}'.", allowed="model, lora")
        own, adapter = _with_revision(given.get("model")), _with_revision(given.get("lora"))
        if isinstance(own, str) and not isinstance(adapter, Fault):
            return _located(own, adapter, source)
    return Fault("model", "must be a path, a hub id, or model+adapter.", got=repr(value)[:60])


def _with_revision(value: object) -> str | None | Fault:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        given = cast("Mapping[str, Any]", value)
        path, revision = given.get("path"), given.get("revision")
        if isinstance(path, str):
            return path if revision is None else f"{path}@{revision}"
    return Fault("model", "must be a path.")


def _of_text(text: str, source: Source) -> MergekitModel | Fault:
    if not text.strip():
        return Fault("model", "is empty.")
    if "+" not in text or is_url(text) or exists(inside(text, source)) or exists(Path(text)):
        return _located(text, None, source)
    parts = text.split("+")
    if len(parts) != 2 or not all(parts):
        return Fault("model", "is no model+adapter.", got=text)
    return _located(parts[0], parts[1], source)


def _located(path: str, adapter: str | None, source: Source) -> MergekitModel:
    shown = path if adapter is None else f"{path}+{adapter}"
    found = _located_path(path, source)
    return MergekitModel(found, None if adapter is None else _located_path(adapter, source), shown)


def _located_path(text: str, source: Source) -> str:
    beside = inside(text, source)
    if is_url(text) or exists(beside):
        return named(beside)
    here = Path(text).expanduser() if not text.startswith("~") else beside
    if exists(here):
        return str(here)
    return named(beside) if is_local(text, source) else text


def names_of(models: Sequence[MergekitModel]) -> dict[MergekitModel, str]:
    """Return a short name for each model, by which errors, reports and random numbers know it."""
    names: dict[MergekitModel, str] = {}
    taken = {"base", "initial"}
    for model in models:
        parts = [model.path, *([model.adapter] if model.adapter else [])]
        words = [_UNFIT.sub("-", Path(p.partition("@")[0]).name).strip("-._") for p in parts]
        name = "+".join(w or "model" for w in words)[:150]
        count = 2
        found = name
        while found in taken:
            found, count = f"{name}-{count}", count + 1
        taken.add(found)
        names[model] = found
    return names
