"""Two experts mixed in every proportion: intermediate-task merging."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eutectic.errors import RequestError
from eutectic.execution.finish import PROVENANCE
from eutectic.execution.request import recipe_from
from eutectic.execution.run import MergeReport, merge
from eutectic.methods import get_method
from eutectic.recipes.schema import Recipe


def sweep(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    output: str | Path,
    mixtures: Sequence[float],
    threads: int | None = None,
    memory: str | int | None = None,
    restart: bool = False,
    **options: Any,
) -> dict[float, MergeReport]:
    """Merge two experts with weights λ and 1 − λ for every λ of `mixtures`.

    The setting of arXiv 2312.04339 in which one expert is wanted and the other, fine-tuned on an
    intermediate task, helps. Each merge goes to `output/<λ>`; finished ones are kept, so a killed
    sweep continues.

    Args:
        recipe: as for `merge`, with exactly two experts; λ is the first one's weight.
        output: folder of the merges.
        mixtures: values of λ in [0, 1].
        threads: as for `merge`.
        memory: as for `merge`.
        restart: as for `merge`.
        **options: as for `merge`.

    Returns:
        λ -> report of its merge; merges that were finished before are left out.

    Raises:
        RequestError: there are not two experts, a λ lies outside [0, 1], or a finished merge in
            `output` was made by another recipe.
    """
    checked, _ = recipe_from(recipe, options)
    if len(checked.experts) != 2:
        raise RequestError(f"a sweep mixes exactly two experts, got {len(checked.experts)}.")
    outside = [value for value in mixtures if not 0 <= value <= 1]
    if outside or not mixtures:
        raise RequestError(f"a sweep takes values from 0 to 1, got {outside or 'none'}.")
    first, second = checked.experts
    stated = checked.model_dump(mode="json", exclude_unset=True)
    reports: dict[float, MergeReport] = {}
    for value in mixtures:
        folder = Path(output) / f"{value:.3g}"
        if (folder / PROVENANCE).exists():
            _check_same(folder, checked)
            continue
        experts = {name: dict(spec) for name, spec in stated["experts"].items()}
        experts[first]["weight"], experts[second]["weight"] = value, 1 - value
        reports[value] = merge(
            {**stated, "experts": experts},
            output=folder,
            threads=threads,
            memory=memory,
            restart=restart,
        )
    return reports


def _check_same(folder: Path, recipe: Recipe) -> None:
    """Refuse a finished merge of another recipe."""
    made = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["recipe"]
    scale = recipe.scale
    if scale is None:
        scale = get_method(recipe.method).default_scale(len(recipe.experts))
    asked = (recipe.method, recipe.parameters, scale, list(recipe.experts))
    if asked != (made["method"], made.get("parameters", {}), made["scale"], list(made["experts"])):
        raise RequestError(
            f"{folder} holds a merge of another recipe. Choose another output, or remove it."
        )
