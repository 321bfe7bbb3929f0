"""What a command line says of a recipe, as the arguments of the functions that carry it out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eutectic.cli.named_words import named_experts, pairs, split_recipe
from eutectic.cli.options import RecipeOptions
from eutectic.errors import RequestError, suggest


def request(
    asked: RecipeOptions, needed: Sequence[str] = ("base", "method")
) -> tuple[Path | None, dict[str, Any]]:
    """Return the recipe file, if one is named, and the options that come on top of it.

    Without a recipe, the options that are `needed` must be among them.
    """
    words = asked.what or []
    if not words:
        raise RequestError(
            "nothing to merge.\nName a recipe, or experts: eutectic merge --base B -m iso_c "
            "-o out/ FOLDER FOLDER"
        )
    recipe, words = split_recipe(words)
    from eutectic.recipes.schema import Recipe

    options = _values(asked.set_ or [], "--set")
    if "output" in options:
        raise RequestError(
            "--set output: whether a model or an adapter is written is no key here.\n"
            "Use --adapter (or --rank N) for an adapter; a model is written without."
        )
    for key in options:
        if key not in Recipe.model_fields:
            known = sorted(Recipe.model_fields)
            raise RequestError(
                f"--set names '{key}', which is no key of a recipe.{suggest(key, known)}\n"
                f"Keys: {', '.join(known)}. Parameters of the method go after --param."
            )
    if asked.scale not in (None, "auto", "norm"):
        try:
            float(asked.scale)
        except ValueError:
            raise RequestError(
                f"--scale '{asked.scale}' must be a number, auto or norm. "
                "Searches with data: eutectic tune."
            ) from None
    keys = (
        "base",
        "method",
        "scale",
        "post",
        "convolutions",
        "fallback",
        "shard_size",
        "vocabulary",
        "chat_template",
    )
    stated = {key: getattr(asked, key) for key in keys}
    options.update({key: value for key, value in stated.items() if value is not None})
    held = adapter_options(
        asked.rank,
        asked.energy,
        asked.others,
        compress=asked.compress,
        balance=asked.balance,
        cut=asked.cut,
    )
    if held or asked.adapter:
        options["adapter"] = held
    if asked.param:
        options["parameters"] = _values(asked.param, "--param")
    experts = named_experts(words, asked.weight or [], asked.statistics or [])
    if experts:
        options["experts"] = experts
    if recipe is None:
        missing = [f"--{key}" for key in needed if key not in options]
        if missing:
            raise RequestError(
                f"without a recipe, {' and '.join(missing)} must be given.\n"
                "Example: eutectic merge --base B --method iso_c -o out/ FOLDER FOLDER"
            )
    return recipe, options


def adapter_options(
    rank: str | None,
    energy: float | None,
    others: str | None,
    tables: str | None = None,
    compress: str | None = None,
    balance: float | None = None,
    cut: str | None = None,
) -> dict[str, Any]:
    """Return what words of a command line say of an adapter, as a recipe would."""
    found: dict[str, Any] = {"energy": energy, "others": others, "tables": tables}
    found |= {"compress": compress, "balance": balance, "cut": cut}
    stated: dict[str, Any] = {key: value for key, value in found.items() if value is not None}
    if rank is not None:
        if rank != "auto" and not rank.isdecimal():
            raise RequestError(f"--rank '{rank}' must be a number of directions, or auto.")
        stated["rank"] = rank if rank == "auto" else int(rank)
    return stated


def _values(items: list[str], option: str) -> dict[str, Any]:
    """Return name -> value of `name=value` words, with values as a recipe would have them."""
    from eutectic.recipes.plain_yaml import UNREADABLE, load_plain

    found: dict[str, Any] = {}
    for name, text in pairs(items, option).items():
        try:
            found[name] = load_plain(text)
        except UNREADABLE:
            raise RequestError(f"{option} {name}: '{text}' is not a YAML value.") from None
    return found
