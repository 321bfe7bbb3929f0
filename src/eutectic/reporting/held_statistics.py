"""What statistics files hold of their layers' inputs, as an inspection and a page show it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from eutectic.checkpoint.writer import check_replaced, write_atomically
from eutectic.conventions_order import in_model_order
from eutectic.errors import RequestError
from eutectic.statistics.gram_forms import GramForm, gram_forms
from eutectic.statistics.statistics_file import StatisticsFile, load_statistics
from eutectic.storage import local_path, url_of
from eutectic.words import counted, public_path


def inspect_statistics(
    files: Mapping[str, str | Path],
    *,
    layers: str | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Return what statistics files hold, and of every input Gram its form and its error bound.

    Headers only: no tensor is read.

    Args:
        files: name -> statistics file.
        layers: only layers with such names (`*` for anything).
        output: file for the same as JSON, written whole or not at all.

    Returns:
        `schema_version`, and `statistics`: name -> `file`, `examples`, `checkpoint`, and `grams`,
        one record for each Gram (see `GramForm`), in the model's order.

    Raises:
        RequestError: no layer has such a name, or the output would replace something else.
        StatisticsError: a file is none of statistics.
    """
    target = None if output is None else _checked(output)
    found: dict[str, Any] = {}
    for name, file in files.items():
        held = load_statistics(file)
        forms = in_order(held)
        kept = [f for f in forms if layers is None or any(fnmatchcase(n, layers) for n in f.layers)]
        if forms and not kept:
            raise RequestError(
                f"{_public(file)}: no layer is called like '{layers}'.\n"
                f"It has, for instance, {forms[0].layers[0]}"
            )
        found[name] = {
            "file": _public(file),
            "examples": held.provenance.get("data", {}).get("examples"),
            "checkpoint": held.fingerprint,
            "grams": [asdict(form) for form in kept],
        }
    result = {"schema_version": 1, "statistics": found}
    if target is not None:
        write_atomically(target, (json.dumps(result, indent=1) + "\n").encode())
    return result


def in_order(held: StatisticsFile) -> list[GramForm]:
    """Return the forms of all input Grams in the order in which an input meets their layers."""
    forms = {form.layers[0]: form for form in gram_forms(held)}
    return [forms[name] for name in in_model_order(forms)]


def kept_in_words(form: GramForm) -> str:
    """Say in which form a Gram is kept."""
    if form.adapters is not None:
        return f"{form.adapters} adapters' rows"
    if form.directions is None:
        return "whole"
    return counted(form.directions, "row" if form.beside is None else "direction")


def _public(file: str | Path) -> str:
    return public_path(url_of(file) or Path(file))


def _checked(output: str | Path) -> Path:
    path = local_path(output)
    if path.is_dir() or (url_of(path) is None and not path.parent.is_dir()):
        raise RequestError(
            f"{path}: what statistics hold is written to a file in a folder that exists, such as "
            "statistics.json."
        )
    check_replaced(path, {"schema_version", "statistics"}, "what statistics hold")
    return path
