"""The folder of a comparison: what it holds, what was found out before, the recipes of its rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from eutectic.checkpoint.writer import write_atomically
from eutectic.comparison.table import Made, file_name
from eutectic.errors import OutputError, RequestError
from eutectic.evaluation.measured_pairs import SUFFIX
from eutectic.storage import names_kept, storage_of
from eutectic.storage.small_files import read_json

TABLE = "comparison.json"
RESULTS = "results.json"
CANDIDATES = "candidates"  # a file per row: its α, the whole search, norms
RECIPES = "recipes"  # a file per row: what merges its model again
WORK = "work"  # deltas and models, while they are needed
LOCK = f"{SUFFIX}.lock"
_OWN = {TABLE, RESULTS, RESULTS + SUFFIX, RESULTS + LOCK, CANDIDATES, RECIPES, WORK}


def check_folder(folder: Path) -> None:
    """Refuse, before any work, a folder that holds what no comparison has made."""
    if folder.name in ("", ".."):
        raise RequestError(f"'{folder}' has no name of its own. Name a new folder.")
    held = [name for name in names_kept(folder) if not name.startswith(f".{RESULTS}")]
    strangers = [name for name in held if name not in _OWN]
    begun = RESULTS + SUFFIX in held or not held or held == [RESULTS + LOCK]
    if strangers or not begun:
        what = f"holds '{(strangers or held)[0]}', which no comparison has made"
        raise RequestError(f"{folder} {what}.\nName a new folder, or move that away.")


class Found(BaseModel):
    """What is known of a row, in a file of its own."""

    model_config = ConfigDict(strict=True, extra="forbid")

    identity: str  # of the deltas and of the way to choose α
    scale: float
    fingerprint: str  # of the model's weights
    norms: dict[str, Any]
    warnings: list[str]
    search: dict[str, Any] | None  # the whole curve, where α was searched


def read_found(folder: Path, name: str, identity: str) -> Found | None:
    """Return what an earlier run found out of a row with the same identity."""
    path = folder / CANDIDATES / f"{file_name(name)}.json"
    with suppress(OutputError, ValidationError, OSError):
        found = Found.model_validate(read_json(path, OutputError))
        return found if found.identity == identity else None
    return None


def write_found(folder: Path, name: str, found: Found) -> None:
    """Keep what was found out of a row."""
    path = folder / CANDIDATES / f"{file_name(name)}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(found.model_dump(), indent=1, ensure_ascii=False)
    write_atomically(path, (text + "\n").encode())


def remove(location: Path) -> None:
    """Remove what is no longer needed."""
    try:
        storage_of(location).remove(location)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{location}: cannot be removed ({reason}).") from None


def write_recipes(folder: Path, recipes: Mapping[str, Mapping[str, Any]], rows: Sequence[Made]):
    """Write a recipe for every row that a recipe makes, which may be moved: paths are absolute."""
    target = folder / RECIPES
    target.mkdir(exist_ok=True)
    for row in rows:
        if row.name not in recipes or row.error is not None:
            continue
        values = {**_absolute(recipes[row.name]), "scale": row.scale}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        head = f"# {row.name}: eutectic merge {file_name(row.name)}.yaml -o merged/\n"
        write_atomically(target / f"{file_name(row.name)}.yaml", (head + text).encode())


def _absolute(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked recipe's values with local paths from the root."""

    def path(text: str) -> str:
        return str(Path(text).absolute()) if Path(text).exists() else text

    values = json.loads(json.dumps(recipe))
    values["base"] = path(values["base"])
    for spec in values["experts"].values():
        for key in ("path", "statistics"):
            if spec.get(key) is not None:
                spec[key] = path(spec[key])
    init = values.get("parameters", {}).get("init")
    if isinstance(init, str) and ("/" in init or "\\" in init):
        values["parameters"]["init"] = path(init)
    return values
