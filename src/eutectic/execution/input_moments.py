"""Second moments of a layer's inputs from the experts' statistics, one at a time and their mean."""

import dataclasses

import torch
from torch import Tensor

from eutectic.execution.matrix_merging import context_of
from eutectic.linalg.shift import SecondMoment
from eutectic.methods.sound_statistics import check_statistics
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import TensorPlan

RIDGE = 0.1  # of the mean energy of an input: directions that no input had are worth something


def input_moment(planned: TensorPlan, inputs: Inputs, place: int) -> SecondMoment | None:
    """Return C_t = A_t/n_t + ε·tr(A_t/n_t)/in·I of one of a tensor's experts, by place; ε = 0.1.

    None for an expert of weight 0, or without inputs: it has no say.
    """
    source = planned.experts[place]
    name = source.statistics.get("")
    if name is None or not source.weight:
        return None
    entry = inputs.statistics[source.owner].read(name, {"gram"}).to(inputs.device)
    width = planned.matrix_shapes[0][1]
    context = dataclasses.replace(context_of(planned), experts=(source.owner,), statistics=(entry,))
    check_statistics({"gram"}, (sum(h for h, _ in planned.matrix_shapes), width), context)
    if not entry.count or not entry.has("gram"):
        return None
    diagonal = torch.zeros(width, dtype=torch.float64, device=inputs.device)
    matrix: Tensor | None = None
    rows: Tensor | None = None
    if entry.gram is not None:
        matrix = entry.gram.double() / entry.count
        energy = float(matrix.trace())
    else:
        assert entry.gram_factor is not None
        factor = rows = entry.gram_factor.double() / entry.count**0.5
        if entry.gram_diagonal is not None:
            diagonal += entry.gram_diagonal.double() / entry.count
        energy = float(diagonal.sum()) + float(factor.square().sum())
    if not energy:
        return None
    return SecondMoment(diagonal + RIDGE * energy / width, rows, matrix)


def mean_moment(planned: TensorPlan, inputs: Inputs) -> SecondMoment | None:
    """Return the mean of C_t over the experts that have a say; None where none has.

    One of them is in memory beside the sum.
    """
    diagonal: Tensor | None = None
    matrix: Tensor | None = None
    rows: list[Tensor] = []
    count = 0
    for place in range(len(planned.experts)):
        own = input_moment(planned, inputs, place)
        if own is None:
            continue
        count += 1
        diagonal = own.diagonal if diagonal is None else diagonal + own.diagonal
        if own.rows is not None:
            rows.append(own.rows)
        if own.matrix is not None:
            matrix = own.matrix if matrix is None else matrix.add_(own.matrix)
    if diagonal is None:
        return None
    return SecondMoment(
        diagonal / count,
        torch.cat(rows) / count**0.5 if rows else None,
        None if matrix is None else matrix.div_(count),
    )
