"""The words that `merge` and `plan` share: a recipe file, or a request on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from eutectic.cli.console import pairs
from eutectic.errors import RequestError, suggest
from eutectic.recipes.document import UNREADABLE

What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE | NAME=EXPERT…",
        help="A recipe (YAML), or the experts as name=path (folder, file, adapter or hub id).",
        show_default=False,
    ),
]
Base = Annotated[str | None, typer.Option(help="The model that all experts started from.")]
MethodName = Annotated[
    str | None, typer.Option("--method", "-m", help="Method; see `eutectic methods`.")
]
Scale = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER | auto",
        help="α: how much of the merged delta is added; auto: in closed form from statistics.",
    ),
]
Parameter = Annotated[
    list[str] | None,
    typer.Option("--param", "-p", metavar="NAME=VALUE", help="A parameter of the method."),
]
Weight = Annotated[
    list[str] | None,
    typer.Option("--weight", "-w", metavar="NAME=W", help="Weight of an expert (default 1)."),
]
StatisticsFile = Annotated[
    list[str] | None,
    typer.Option("--statistics", "-s", metavar="NAME=FILE", help="Statistics of an expert."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any other key of a recipe: dtype, heads, missing, seed, precision, scale_tensors …",
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="Tensors merged side by side (default: one per core).", min=1)
]
Memory = Annotated[
    str | None, typer.Option(help="Limit, such as 4GB (default: 60 % of what is available).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def request(
    what: list[str] | None,
    base: str | None,
    method: str | None,
    scale: str | None,
    parameters: list[str] | None,
    weights: list[str] | None,
    statistics: list[str] | None,
    settings: list[str] | None,
) -> tuple[Path | None, dict[str, Any]]:
    """Return the recipe file, if one is named, and the options that come on top of it.

    Raises:
        RequestError: neither a recipe nor experts are named, or words do not fit together.
    """
    words = what or []
    if not words:
        raise RequestError(
            "nothing to merge.\nName a recipe, or experts: eutectic merge --base B -m iso_c "
            "-o out/ a=PATH b=PATH"
        )
    recipe, words = split_recipe(words)
    from eutectic.recipes.schema import Recipe

    options = _values(settings or [], "--set")
    for key in options:
        if key not in Recipe.model_fields:
            known = sorted(Recipe.model_fields)
            raise RequestError(
                f"--set names '{key}', which is no key of a recipe.{suggest(key, known)}\n"
                f"Keys: {', '.join(known)}. Parameters of the method go after --param."
            )
    if scale is not None:
        _check_scale(scale)
    options.update(
        {k: v for k, v in {"base": base, "method": method, "scale": scale}.items() if v is not None}
    )
    if parameters:
        options["parameters"] = _values(parameters, "--param")
    experts = named_experts(words, weights or [], statistics or [])
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
    found: dict[str, Any] = {}
    for name, text in pairs(items, option).items():
        try:
            found[name] = yaml.safe_load(text)
        except UNREADABLE:
            raise RequestError(f"{option} {name}: '{text}' is not a YAML value.") from None
    return found


def _check_scale(text: str) -> None:
    if text == "auto":
        return
    try:
        float(text)
    except ValueError:
        raise RequestError(
            f"--scale '{text}' must be a number or auto. Searches with data: eutectic tune."
        ) from None


def mixtures(text: str) -> list[float]:
    """Return the values of `0,0.3,1` or `0:1:11` (start, stop, how many).

    Raises:
        RequestError: the text has neither form.
    """
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
    """Return the recipe file, if the first word is one, and the words that name experts.

    Raises:
        RequestError: the first word is a folder without a name.
    """
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
    """Return expert -> path, weight and statistics, as a recipe would have them.

    Raises:
        RequestError: a word has no name, or an option names no expert of the command line.
    """
    experts: dict[str, dict[str, Any]] = {
        name: {"path": path} for name, path in pairs(words, "expert").items()
    }
    for option, key, values in (
        ("--weight", "weight", pairs(weights, "--weight")),
        ("--statistics", "statistics", pairs(statistics, "--statistics")),
    ):
        for name, value in values.items():
            if name not in experts:
                raise RequestError(
                    f"{option} names '{name}', which is not an expert on the command line."
                    f"{suggest(name, list(experts))}\n"
                    f"Experts here: {', '.join(experts) or 'none; in a recipe, it stands there'}."
                )
            experts[name][key] = value
    return experts
