"""The statistics of one tensor, or of some of its rows, as the task that merges it reads them."""

from __future__ import annotations

import dataclasses

from eutectic.conventions import PARTS, is_packed
from eutectic.methods import get_method
from eutectic.planning.collected import wanted
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.types import LayerStatistics

PerExpert = tuple[LayerStatistics | None, ...] | None


def statistics_of(planned: TensorPlan, inputs: Inputs, part: str = "") -> PerExpert:
    """Return the statistics of a matrix for each of its experts, or None without any.

    Of a file, no more is read than the tensor's method may ask for. `part` names a part of a
    packed in-projection.
    """
    if not inputs.statistics or planned.layout.stacked:
        return None
    only = wanted(get_method(planned.method), planned.parameters)
    found: list[LayerStatistics | None] = []
    for source in planned.experts:
        inside = source.statistics.get(part)
        if inside is None:
            found.append(None)
            continue
        entry = inputs.statistics[source.owner].read(inside, only)
        found.append(_as_matrix(entry, planned).to(inputs.device))
    return tuple(found)


def part_statistics(
    planned: TensorPlan, inputs: Inputs, whole: PerExpert, rows: slice
) -> PerExpert:
    """Return the statistics of some output rows of a fused matrix.

    Where query, key and value of a packed in-projection saw different inputs, those of the one
    that the rows belong to.
    """
    if whole is None:
        return None
    cut = tuple(_rows_of(entry, rows) for entry in whole)
    third = planned.shape[0] // len(PARTS)
    inside = third > 0 and (rows.stop - 1) // third == rows.start // third
    if not (is_packed(planned.name) and inside):
        return cut
    index = rows.start // third
    offset = slice(rows.start - index * third, rows.stop - index * third)
    own = statistics_of(planned, inputs, PARTS[index])
    assert own is not None
    return tuple(_joined(a, _rows_of(b, offset)) for a, b in zip(cut, own, strict=True))


def _as_matrix(entry: LayerStatistics, planned: TensorPlan) -> LayerStatistics:
    """Lay a diagonal Fisher, which has the parameter's own shape, out as the method sees it."""
    fisher = entry.fisher_diagonal
    if fisher is None or tuple(fisher.shape) != planned.shape:
        return entry  # of another shape, which the method will refuse
    fisher = fisher.reshape(planned.matrix_shape)
    if planned.layout.transpose:
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
