"""Two experts mixed in every proportion: intermediate-task merging."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eutectic.errors import RequestError
from eutectic.execution.finish import PROVENANCE
from eutectic.execution.journal import request_identity
from eutectic.execution.recipe_options import recipe_from
from eutectic.execution.run import MergeReport, merge
from eutectic.planning.inputs import open_inputs
from eutectic.planning.plan import make_plan


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
    intermediate task, helps. Each merge goes to `output/<λ>`, see `mixture_name`; finished ones are
    kept, so a killed sweep continues.

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
            `output` was made by another recipe, or of inputs that have changed since.
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
        folder = Path(output) / mixture_name(value)
        experts = {name: dict(spec) for name, spec in stated["experts"].items()}
        experts[first]["weight"], experts[second]["weight"] = value, 1 - value
        mixed = {**stated, "experts": experts}
        if (folder / PROVENANCE).exists():
            _check_same(folder, mixed)
            continue
        reports[value] = merge(
            mixed, output=folder, threads=threads, memory=memory, restart=restart
        )
    return reports


def mixture_name(value: float) -> str:
    """Return the name of λ's folder: the shortest text that reads as λ again, so no two share one.

    Example:
        >>> mixture_name(1.0), mixture_name(0.5), mixture_name(1 / 3)
        ('1', '0.5', '0.3333333333333333')
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def _check_same(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Refuse a finished merge of another request."""
    made = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    checked, source = recipe_from(recipe, {})
    with open_inputs(checked, source) as inputs:
        asked = request_identity(make_plan(checked, inputs, source), inputs)
    if made.get("request") != asked:
        raise RequestError(
            f"{folder} holds a merge of another request: the recipe, an input or the version has "
            "changed since.\nChoose another output, or remove it."
        )
