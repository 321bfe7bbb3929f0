"""The options that `merge` and `plan` share: a recipe file, or a request on the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from eutectic.cli.console import pairs
from eutectic.cli.options import StatisticsFiles, option
from eutectic.errors import RequestError, suggest

What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE | NAME=EXPERT…",
        help="A recipe (YAML), or the experts as name=path (folder, file, adapter or hub id).",
        show_default=False,
    ),
]
Base = Annotated[str | None, typer.Option(help="The model that all experts started from.")]


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """A recipe, or what one would say."""

    what: What = None
    base: Base = None
    method: str | None = option(None, "Method; see `eutectic methods`.", "--method", "-m")
    scale: str | None = option(
        None,
        "α: how much of the merged delta is added; auto: in closed form from statistics.",
        metavar="NUMBER | auto",
    )
    param: list[str] | None = option(
        None, "A parameter of the method.", "--param", "-p", metavar="NAME=VALUE"
    )
    weight: list[str] | None = option(
        None, "Weight of an expert (default 1).", "--weight", "-w", metavar="NAME=W"
    )
    statistics: StatisticsFiles = None
    shard_size: str | None = option(
        None,
        "Most bytes of tensors in one file, such as 5GB (default: files like the base's).",
        metavar="SIZE",
    )
    set_: list[str] | None = option(
        None,
        "Any other key of a recipe: dtype, heads, missing, seed, precision, scale_tensors …",
        "--set",
        metavar="KEY=VALUE",
    )


@dataclass(frozen=True, kw_only=True)
class SearchedRecipeOptions(RecipeOptions):
    """The same where the scale is searched."""

    scale: None = field(default=None, init=False)
    shard_size: None = field(default=None, init=False)


def request(asked: RecipeOptions) -> tuple[Path | None, dict[str, Any]]:
    """Return the recipe file, if one is named, and the options that come on top of it."""
    words = asked.what or []
    if not words:
        raise RequestError(
            "nothing to merge.\nName a recipe, or experts: eutectic merge --base B -m iso_c "
            "-o out/ a=PATH b=PATH"
        )
    recipe, words = split_recipe(words)
    from eutectic.recipes.schema import Recipe

    options = _values(asked.set_ or [], "--set")
    for key in options:
        if key not in Recipe.model_fields:
            known = sorted(Recipe.model_fields)
            raise RequestError(
                f"--set names '{key}', which is no key of a recipe.{suggest(key, known)}\n"
                f"Keys: {', '.join(known)}. Parameters of the method go after --param."
            )
    if asked.scale not in (None, "auto"):
        try:
            float(asked.scale)
        except ValueError:
            raise RequestError(
                f"--scale '{asked.scale}' must be a number or auto. "
                "Searches with data: eutectic tune."
            ) from None
    stated = {key: getattr(asked, key) for key in ("base", "method", "scale", "shard_size")}
    options.update({key: value for key, value in stated.items() if value is not None})
    if asked.param:
        options["parameters"] = _values(asked.param, "--param")
    experts = named_experts(words, asked.weight or [], asked.statistics or [])
    if experts:
        options["experts"] = experts
    if recipe is None:
        missing = [f"--{key}" for key in ("base", "method") if key not in options]
        if missing:
            raise RequestError(
                f"without a recipe, {' and '.join(missing)} must be given.\n"
                "Example: eutectic merge --base B --method iso_c -o out/ a=PATH b=PATH"
            )
    return recipe, options


def _values(items: list[str], option: str) -> dict[str, Any]:
    """Return name -> value of `name=value` words, with values as a recipe would have them."""
    import yaml

    from eutectic.recipes.document import UNREADABLE

    found: dict[str, Any] = {}
    for name, text in pairs(items, option).items():
        try:
            found[name] = yaml.safe_load(text)
        except UNREADABLE:
            raise RequestError(f"{option} {name}: '{text}' is not a YAML value.") from None
    return found


def mixtures(text: str) -> list[float]:
    """Return the values of `0,0.3,1` or `0:1:11` (start, stop, how many)."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        start, stop, count = text.split(":")
        steps = int(count) - 1
        low, high = float(start), float(stop)
        return [round(low + (high - low) * i / steps, 6) for i in range(steps + 1)]
    except (ValueError, ZeroDivisionError):
        raise RequestError(
            f"--sweep '{text}' must be numbers with commas, or START:STOP:COUNT such as 0:1:11."
        ) from None


def split_recipe(words: list[str]) -> tuple[Path | None, list[str]]:
    """Return the recipe file, if the first word is one, and the words that name experts."""
    if "=" in words[0]:
        return None, words
    recipe = Path(words[0])
    if recipe.is_dir():
        raise RequestError(
            f"'{recipe}' is a folder, not a recipe (YAML).\n"
            f"Experts are given with a name each: NAME={recipe}"
        )
    return recipe, words[1:]


def named_experts(
    words: list[str], weights: list[str], statistics: list[str]
) -> dict[str, dict[str, Any]]:
    """Return expert -> path, weight and statistics, as a recipe would have them."""
    experts: dict[str, dict[str, Any]] = {
        name: {"path": path} for name, path in pairs(words, "expert").items()
    }
    further = {
        "weight": pairs(weights, "--weight"),
        "statistics": pairs(statistics, "--statistics"),
    }
    for key, values in further.items():
        for name, value in values.items():
            if name not in experts:
                known = (
                    f"Experts on the command line: {', '.join(experts)}."
                    if experts
                    else "No experts were given on the command line. When you pass a recipe, set "
                    "them there."
                )
                raise RequestError(
                    f"--{key} names '{name}', which is not an expert on the command line."
                    f"{suggest(name, list(experts))}\n{known}"
                )
            experts[name][key] = value
    return experts
