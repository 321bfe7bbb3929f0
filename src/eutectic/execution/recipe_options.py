"""What a caller asks for, checked: the recipe from a file, a mapping or options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eutectic.recipes.load import Source, check_recipe, load_recipe
from eutectic.recipes.schema import Recipe


def recipe_from(
    recipe: str | Path | Mapping[str, Any] | None, options: Mapping[str, Any]
) -> tuple[Recipe, Source]:
    """Return the checked recipe of a file, a mapping, or options, which win over both.

    Raises:
        RecipeError: with every fault.
    """
    if isinstance(recipe, (str, Path)):
        checked, source = load_recipe(recipe)
        if not options:
            return checked, source
        # Paths of the file are resolved by now; lines no longer describe the whole.
        stated = checked.model_dump(mode="json", exclude_unset=True)
        return check_recipe({**stated, **sorted_options(options, stated)}), source
    stated = dict(recipe or {})
    return check_recipe({**stated, **sorted_options(options, stated)}), Source()


def sorted_options(
    options: Mapping[str, Any], stated: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Move keys that are no recipe's under `parameters`, where the method checks them."""
    known = {k: v for k, v in options.items() if k in Recipe.model_fields}
    other = {k: v for k, v in options.items() if k not in Recipe.model_fields}
    before = (stated or {}).get("parameters", {})
    if not isinstance(known.get("parameters", {}), Mapping):
        return known  # refused with its type when the recipe is checked
    if other or "parameters" in known:
        known["parameters"] = {**before, **known.get("parameters", {}), **other}
    return known
