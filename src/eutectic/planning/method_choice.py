"""Which method merges a tensor: the recipe's, its fall-back without statistics, or the mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from eutectic.conventions import PARTS, is_packed
from eutectic.errors import Note
from eutectic.methods import get_method
from eutectic.planning.collected import lacks
from eutectic.planning.merge_request import MergeRequest
from eutectic.planning.tensor_plan import Source, TensorPlan
from eutectic.planning.tensors import source_in
from eutectic.types import Treatment


def with_method(planned: TensorPlan, request: MergeRequest) -> TensorPlan:
    """Name the method that merges the tensor, with its parameters and α.

    A diagonal Fisher weighs entry by entry, so tables and convolutions have one as matrices do.
    Copies of a tied table are merged alike: statistics know it by one of its names only.
    """
    treatment, method, parameters = planned.treatment, request.method, request.parameters
    if treatment in (Treatment.COPY, Treatment.HEAD):
        return replace(planned, scale=1.0, tunable=False)
    chosen = method.name
    reason = planned.reason
    needs = {n for n in method.needs(parameters) if n != "base"}
    if treatment is not Treatment.MATRIX and not method.elementwise:
        has_rule = method.vectors and treatment is Treatment.VECTOR
        if needs == {"fisher_diagonal"} and not has_rule:
            has_rule = planned.name not in {*request.tied, *request.tied.values()}
            reason += () if has_rule else (Note("averaged_as_tied"),)
        chosen = method.name if has_rule else "average"
    if chosen == method.name and needs and planned.layout.stacked:
        chosen = method.fallback(parameters)
        reason += (Note("no_statistics_of_stacks"),)
    elif chosen == method.name and needs:
        lacking = _experts_without(planned, needs, request)
        if lacking and is_packed(planned.name):
            parts = [_experts_without(planned, needs, request, p) for p in PARTS]
            lacking = list(dict.fromkeys(name for part in parts for name in part))
            if not lacking:
                reason += (Note("split_by_inputs"),)
                planned, lacking = _in_parts(planned)
        if lacking:
            chosen = method.fallback(parameters)
            reason += (Note("no_statistics", tuple(lacking)),)
    own = get_method(chosen)
    is_matrix = treatment is Treatment.MATRIX
    plain = request.recipe.scale_tensors == "matrix" and not is_matrix
    starts = request.inputs.initial is not None and own is method
    return replace(
        planned,
        method=chosen,
        parameters=parameters if own is method else own.parameters(),
        experts=_with_own_parameters(planned, request) if own is method else planned.experts,
        reason=reason,
        scale=request.scale if planned.tunable and not plain else planned.scale,
        tunable=planned.tunable and not plain,
        compared=method.finish is not None and is_matrix and not own.elementwise,
        initial=_initial(planned, request) if starts else None,
    )


def _with_own_parameters(planned: TensorPlan, request: MergeRequest) -> tuple[Source, ...]:
    own = request.own_parameters
    return tuple(replace(s, parameters=own.get(s.owner)) for s in planned.experts)


def _initial(planned: TensorPlan, request: MergeRequest) -> Source:
    assert request.inputs.initial is not None
    return source_in("initial", request.inputs.initial, planned.name, planned.seed_name)


def _in_parts(planned: TensorPlan) -> tuple[TensorPlan, list[str]]:
    """Split a packed in-projection into query, key and value, whose statistics are apart.

    A rule may cut them further. One that cuts across them leaves no expert with statistics.
    """
    third = planned.shape[0] // len(PARTS)
    heights = planned.layout.split or (third,) * len(PARTS)
    if not {third, 2 * third} <= set(accumulate(heights)):
        return planned, [source.owner for source in planned.experts]
    return replace(planned, layout=replace(planned.layout, split=heights)), []


def _experts_without(
    planned: TensorPlan, needs: set[str], request: MergeRequest, part: str = ""
) -> list[str]:
    """Return the experts that lack what is needed of a tensor, or of a part of it."""
    return [s.owner for s in planned.experts if _is_without(s, needs, request, part)]


def _is_without(source: Source, needs: set[str], request: MergeRequest, part: str) -> bool:
    statistics = request.inputs.statistics.get(source.owner)
    candidates: Sequence[str | None] = (source.statistics.get(part), source.statistics.get(""))
    return all(lacks(statistics, name, needs) for name in candidates)
