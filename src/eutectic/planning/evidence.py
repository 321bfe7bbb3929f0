"""The statistics of one tensor, or of some of its rows, as the job that merges it reads them."""

from __future__ import annotations

import dataclasses

from eutectic.conventions import PARTS, is_packed
from eutectic.planning.collected import wanted
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan, method_of
from eutectic.planning.tensors import TensorPlan
from eutectic.planning.values import matrix_shape
from eutectic.types import LayerStatistics

Evidence = tuple[LayerStatistics | None, ...] | None


def statistics_of(planned: TensorPlan, plan: Plan, inputs: Inputs, part: str = "") -> Evidence:
    """Return the statistics of a matrix for each of its experts, or None without any.

    Of a file, no more is read than the tensor's method may ask for. `part` names a part of a
    packed in-projection.
    """
    if not inputs.statistics or planned.decision.stacked:
        return None
    only = wanted(*method_of(planned, plan))
    found: list[LayerStatistics | None] = []
    for expert in planned.experts:
        inside = plan.statistics_names.get(expert, {}).get(planned.name + part)
        if inside is None:
            found.append(None)
            continue
        entry = inputs.statistics[expert].read(inside, only)
        found.append(_as_matrix(entry, planned))
    return tuple(found)


def part_statistics(
    planned: TensorPlan, plan: Plan, inputs: Inputs, whole: Evidence, rows: slice
) -> Evidence:
    """Return the statistics of some output rows of a fused matrix.

    Where query, key and value of a packed in-projection saw different inputs, those of the one
    that the rows belong to.
    """
    if whole is None:
        return None
    cut = tuple(_rows_of(entry, rows) for entry in whole)
    third = planned.entry.shape[0] // len(PARTS)
    inside = third > 0 and (rows.stop - 1) // third == rows.start // third
    if not (is_packed(planned.name) and inside):
        return cut
    index = rows.start // third
    offset = slice(rows.start - index * third, rows.stop - index * third)
    own = statistics_of(planned, plan, inputs, PARTS[index])
    assert own is not None
    return tuple(_joined(a, _rows_of(b, offset)) for a, b in zip(cut, own, strict=True))


def _as_matrix(entry: LayerStatistics, planned: TensorPlan) -> LayerStatistics:
    """Lay a diagonal Fisher, which has the parameter's own shape, out as the method sees it."""
    fisher = entry.fisher_diagonal
    if fisher is None or tuple(fisher.shape) != planned.entry.shape:
        return entry  # of another shape, which the method will refuse
    fisher = fisher.reshape(matrix_shape(planned))
    if planned.decision.transpose:
        fisher = fisher.mT
    return dataclasses.replace(entry, fisher_diagonal=fisher)


def _rows_of(entry: LayerStatistics | None, rows: slice) -> LayerStatistics | None:
    if entry is None:
        return None
    outer, fisher = entry.output_gradient_gram, entry.fisher_diagonal
    return dataclasses.replace(
        entry,
        output_gradient_gram=None if outer is None else outer[rows, rows],
        fisher_diagonal=None if fisher is None else fisher[rows],
    )


def _joined(whole: LayerStatistics | None, part: LayerStatistics | None) -> LayerStatistics | None:
    """Return the part's Grams, beside what was collected of the whole parameter only."""
    if whole is None or part is None:
        return part or whole
    if whole.gram is not None or whole.gram_factor is not None:
        return whole
    return dataclasses.replace(part, fisher_diagonal=whole.fisher_diagonal)
