"""What a plan is made from: a checked recipe and its inputs, and the recipe as it was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eutectic.methods import Method
from eutectic.planning.inputs import Inputs
from eutectic.recipes.document import Source as Document
from eutectic.recipes.schema import Recipe


@dataclass(frozen=True)
class MergeRequest:
    """A recipe with its inputs. Planning reads it; nothing that runs afterwards does.

    Attributes:
        recipe: what was asked for.
        inputs: base, experts and statistics, of which headers are known.
        document: where the recipe was written, for the lines of faults.
        method: the recipe's method.
        parameters: its checked parameters.
        scale: α where no rule says otherwise; while it is to be searched, the method's default.
        own_parameters: expert -> its parameters, for experts that have some of their own.
        tied: tensor -> the earlier tensor of the file that it is a copy of.
        statistics_names: expert -> base name (with the part of a packed tensor) -> name in its
            statistics.
    """

    recipe: Recipe
    inputs: Inputs
    document: Document
    method: Method
    parameters: Any
    scale: float
    own_parameters: Mapping[str, Any]
    tied: Mapping[str, str]
    statistics_names: Mapping[str, Mapping[str, str]]

    def named_by(self, name: str) -> str:
        """Return whose rules and random numbers a tensor takes: its own, or its tied partner's."""
        return self.tied.get(name, name)


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
