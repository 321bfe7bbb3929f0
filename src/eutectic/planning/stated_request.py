"""What was asked for, as plan and card keep it: complete, and as it may be published."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from eutectic.checkpoint.hub import hub_id
from eutectic.recipes.schema import Recipe
from eutectic.words import plain


@dataclass(frozen=True)
class StatedRequest:
    """A recipe as it was written."""

    complete: Mapping[str, Any]  # every value, defaults included; it identifies the request
    # what a user would write to get the same, without the folders of local paths, since cards are
    # published. The scale is as asked for, a search included
    published: Mapping[str, Any]
    names: Mapping[str, str]  # parent ("base", "initial", the experts) -> its name in public
    statistics_files: Mapping[str, str]  # expert -> its statistics file
    hub_base: bool = False  # whether the base is a model of the hub, which cards may link to
    default_for_texts: bool = False  # no scale is stated, and the models write texts


def stated_request(recipe: Recipe) -> StatedRequest:
    """Return what a recipe says."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    names = {"base": _shown(recipe.reference)}
    values["base"] = None if recipe.base is None else names["base"]
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
    complete, hub_base = recipe.model_dump(mode="json"), _is_hub_id(recipe.reference)
    if recipe.post is None:  # as before there were any
        complete = {k: v for k, v in complete.items() if k != "post"}
    if recipe.convolutions == "average":
        complete = {k: v for k, v in complete.items() if k != "convolutions"}
    if recipe.adapter_options is None:
        complete = {k: v for k, v in complete.items() if k not in ("output", "adapter")}
    else:  # what becomes of other changes is decided when all is merged
        complete = {**complete, "adapter": {**(complete["adapter"] or {}), "others": None}}
    if recipe.script is not None and recipe.script.stated is not None:
        complete = {**complete, "stated": recipe.script.stated}
        values = {"stated": _published(recipe.script.stated)}
    return StatedRequest(complete, values, names, files, hub_base)


def _published(stated: Any) -> Any:
    """Return what was written without the folders of local paths."""
    if isinstance(stated, Mapping):
        items = cast("Mapping[str, Any]", stated).items()
        return {key: _published(value) for key, value in items}
    if isinstance(stated, (list, tuple)):
        return [_published(value) for value in cast("Sequence[Any]", stated)]
    if isinstance(stated, str) and "/" in stated and "\n" not in stated:
        return "+".join(_shown(part) for part in stated.split("+"))
    return stated


def _shown(path: str) -> str:
    """Return a hub id as it is, and of a local path its last part."""
    return path if _is_hub_id(path) else plain(Path(path).name) or path


def _is_hub_id(path: str) -> bool:
    """Tell whether a checked recipe means a model of the hub: its local paths lead somewhere."""
    return hub_id(path) is not None and not Path(path).exists()
