"""What was asked for, as cards and provenance repeat it. Nothing is decided by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eutectic.recipes.schema import Recipe


@dataclass(frozen=True)
class StatedRequest:
    """A recipe as it was written.

    Attributes:
        complete: every value, defaults included; it identifies the request.
        published: what a user would write to get the same, without the folders of local paths,
            since cards are published. The scale is as asked for, a search included.
        names: parent ("base", "initial", the experts) -> what it is called in public.
        statistics_files: expert -> its statistics file.
    """

    complete: Mapping[str, Any]
    published: Mapping[str, Any]
    names: Mapping[str, str]
    statistics_files: Mapping[str, str]


def stated_request(recipe: Recipe) -> StatedRequest:
    """Return what a recipe says."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    names = {"base": _shown(recipe.base)}
    values["base"] = names["base"]
    init = recipe.parameters.get("init")
    if isinstance(init, str):
        names["initial"] = _shown(init)
        values["parameters"] = {**recipe.parameters, "init": names["initial"]}
    for name, spec in recipe.experts.items():
        own = spec.model_dump(mode="json", exclude_defaults=True)
        own = {k: _shown(v) if isinstance(v, str) else v for k, v in own.items()}
        values["experts"][name] = own["path"] if len(own) == 1 else own
        names[name] = own["path"]
    files = {n: s.statistics for n, s in recipe.experts.items() if s.statistics is not None}
    return StatedRequest(recipe.model_dump(mode="json"), values, names, files)


def _shown(path: str) -> str:
    """Return a hub id as it is, and of a local path its last part."""
    parts = Path(path).parts
    if not path.startswith((".", "/", "~")) and len(parts) <= 2:
        return path
    return Path(path).name or path
