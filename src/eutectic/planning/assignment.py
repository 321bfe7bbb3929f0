"""Which method merges a tensor: the recipe's, its fall-back without statistics, or the mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

from eutectic.conventions import PARTS, is_packed
from eutectic.errors import Note
from eutectic.methods import Method
from eutectic.planning.collected import lacks
from eutectic.planning.tensors import TensorPlan
from eutectic.recipes.schema import Recipe
from eutectic.types import Statistics, Treatment


def with_method(
    planned: TensorPlan,
    method: Method,
    parameters: Any,
    scale: float,
    recipe: Recipe,
    statistics: Mapping[str, Statistics],
    names: Mapping[str, Mapping[str, str]],
    tied: Mapping[str, str],
) -> TensorPlan:
    """Name the method that merges the tensor: the recipe's, its fall-back, or the mean.

    A diagonal Fisher weighs entry by entry, so tables and convolutions have one as matrices do.
    Copies of a tied table are merged alike: statistics know it by one of its names only.
    """
    treatment = planned.decision.treatment
    if treatment in (Treatment.COPY, Treatment.HEAD):
        return planned
    chosen = method.name
    reason = planned.decision.reason
    needs = {n for n in method.needs(parameters) if n != "base"}
    if treatment is not Treatment.MATRIX and not method.elementwise:
        has_rule = method.vectors and treatment is Treatment.VECTOR
        if needs == {"fisher_diagonal"} and not has_rule:
            has_rule = planned.name not in {*tied, *tied.values()}
            reason += () if has_rule else (Note("averaged_as_tied"),)
        chosen = method.name if has_rule else "average"
    if chosen == method.name and needs and planned.decision.stacked:
        chosen = method.fallback(parameters)
        reason += (Note("no_statistics_of_stacks"),)
    elif chosen == method.name and needs:
        lacking = _experts_without(planned, needs, statistics, names)
        if lacking and is_packed(planned.name):
            parts = [_experts_without(planned, needs, statistics, names, p) for p in PARTS]
            lacking = list(dict.fromkeys(name for part in parts for name in part))
            if not lacking:
                reason += (Note("split_by_inputs"),)
                planned, lacking = _in_parts(planned)
        if lacking:
            chosen = method.fallback(parameters)
            reason += (Note("no_statistics", tuple(lacking)),)
    alpha = planned.decision.scale
    plain = recipe.scale_tensors == "matrix" and treatment is not Treatment.MATRIX
    tunable = alpha is None and not plain
    if alpha is None:
        alpha = 1.0 if plain else scale
    return replace(
        planned,
        method=chosen,
        scale=alpha,
        tunable=tunable,
        decision=planned.decision.because(*reason),
    )


def _in_parts(planned: TensorPlan) -> tuple[TensorPlan, list[str]]:
    """Split a packed in-projection into query, key and value, whose statistics are apart.

    A rule may cut them further. One that cuts across them leaves no expert with statistics.
    """
    third = planned.entry.shape[0] // len(PARTS)
    heights = planned.decision.split or (third,) * len(PARTS)
    if not {third, 2 * third} <= set(accumulate(heights)):
        return planned, list(planned.experts)
    return replace(planned, decision=replace(planned.decision, split=heights)), []


def _experts_without(
    planned: TensorPlan,
    needs: set[str],
    statistics: Mapping[str, Statistics],
    names: Mapping[str, Mapping[str, str]],
    part: str = "",
) -> list[str]:
    """Return the experts that lack what is needed of a tensor, or of a part of it."""
    lacking: list[str] = []
    for expert in planned.experts:
        own = names.get(expert, {})
        candidates = {own.get(planned.name + part), own.get(planned.name)}
        if all(lacks(statistics.get(expert), name, needs) for name in candidates):
            lacking.append(expert)
    return lacking
