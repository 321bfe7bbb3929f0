"""Words of a command line that give something a name: `NAME=PATH`, and folders with their own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eutectic.errors import RequestError, suggest

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
_RECIPES = (".yaml", ".yml", ".json")
_DRAFTS = ("recipe.yaml", "recipe.yml")
_NO_NAME = re.compile(r"[^A-Za-z0-9_.+-]+")


def pair(item: str, what: str) -> tuple[str, str]:
    """Return name and value of a `name=value` word; refuse one without either."""
    name, separator, value = item.partition("=")
    if not separator or not name or not value:
        raise RequestError(f"{what} '{item}' must have the form name=value.")
    return name, value


def pairs(items: list[str], what: str) -> dict[str, str]:
    """Return name -> value of `name=value` words; refuse others, and a name that stands twice."""
    return unique((pair(item, what) for item in items), what)


def unique(named: Iterable[tuple[str, str]], what: str) -> dict[str, str]:
    """Return name -> value; refuse a name that stands twice."""
    found: dict[str, str] = {}
    for name, value in named:
        if name in found:
            raise RequestError(f"{what} '{name}' is given twice.")
        found[name] = value
    return found


def named_paths(words: Iterable[str], what: str) -> dict[str, str]:
    """Return name -> path of `NAME=PATH` words, and of paths, whose last part is the name.

    Files lose their ending, names on the hub their owner and revision. RequestError where two
    have one name.
    """
    found: dict[str, str] = {}
    for word in words:
        # Folders may be called alpha=0.3, also in stores; a slash before it is none of a name.
        before, equals, _ = word.partition("=")
        alone = not equals or "/" in before or Path(word).exists()
        name, path = (_own_name(word), word) if alone else pair(word, what)
        if name in found:
            raise RequestError(
                f"{what} '{name}' is given twice: {found[name]} and {path}.\n"
                f"Name one of them otherwise: NAME={path}"
            )
        found[name] = path
    return found


def _own_name(word: str) -> str:
    """Return what a path is called: the last part of it, in letters that names may have."""
    path = Path(word)
    if path.name in ("", "..") or word in (".", "./"):
        path = path.resolve()
    name = path.stem if path.suffix in _WEIGHTS else path.name
    if not path.exists():
        name = name.partition("@")[0]
    found = _NO_NAME.sub("-", name).lstrip("-_.+")
    if not found:
        raise RequestError(f"'{word}' gives no name.\nWrite NAME={word}")
    return found


def split_recipe(words: list[str]) -> tuple[Path | None, list[str]]:
    """Return the recipe file, if the first word is one, and the words that name experts."""
    first = words[0]
    path = Path(first)
    found = next((path / name for name in _DRAFTS if (path / name).is_file()), None)
    if found is not None and not (path / "config.json").exists():
        raise RequestError(f"'{first}' is a folder with a recipe.\nName the file: {found}")
    if path.suffix in _RECIPES and not path.is_dir():
        return path, words[1:]
    named = "=" in first or "://" in first or path.is_dir() or path.suffix in _WEIGHTS
    # Of what is not there: `org/name` is on the hub, `recipe` and `./recipe` are mistyped.
    on_hub = not path.exists() and "/" in first and not first.startswith((".", "/", "~"))
    return (None, words) if named or on_hub else (path, words[1:])


def named_experts(
    words: list[str], weights: list[str], statistics: list[str]
) -> dict[str, dict[str, Any]]:
    """Return expert -> path, weight and statistics, as a recipe would have them."""
    experts: dict[str, dict[str, Any]] = {
        name: {"path": path} for name, path in named_paths(words, "expert").items()
    }
    weighted, measured = pairs(weights, "--weight"), pairs(statistics, "--statistics")
    for key, values in (("weight", weighted), ("statistics", measured)):
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
