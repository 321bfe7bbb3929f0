"""The second moment of a layer's inputs over all experts, from their statistics."""

import dataclasses

import torch
from torch import Tensor

from eutectic.execution.matrix_merging import context_of
from eutectic.linalg.shift import SecondMoment
from eutectic.methods.sound_statistics import check_statistics
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.types import LayerStatistics

RIDGE = 0.1  # of the mean energy of an input: directions that no input had are worth something


def input_moment(planned: TensorPlan, inputs: Inputs) -> SecondMoment | None:
    """Return C = mean_t A_t/n_t + ε·tr(…)/in·I, over the experts that take part; ε = 0.1.

    None where no expert saw an input. Experts of weight 0, or without inputs, have no say.
    """
    context = context_of(planned)
    entries: list[LayerStatistics | None] = []
    for source in planned.experts:
        name = source.statistics.get("")
        held = name is not None and bool(source.weight)
        read = inputs.statistics[source.owner].read(name, {"gram"}) if held and name else None
        entries.append(None if read is None else read.to(inputs.device))
    width = planned.matrix_shapes[0][1]
    context = dataclasses.replace(context, statistics=tuple(entries))
    check_statistics({"gram"}, (sum(h for h, _ in planned.matrix_shapes), width), context)
    seen = [e for e in entries if e is not None and e.count and e.has("gram")]
    if not seen:
        return None
    diagonal = torch.zeros(width, dtype=torch.float64, device=inputs.device)
    matrix: Tensor | None = None
    rows: list[Tensor] = []
    for entry in seen:
        share = 1 / (entry.count * len(seen))
        if entry.gram is not None:
            own = entry.gram.double() * share
            matrix = own if matrix is None else matrix.add_(own)
        elif entry.gram_factor is not None:
            rows.append(entry.gram_factor.double() * share**0.5)
            if entry.gram_diagonal is not None:
                diagonal += entry.gram_diagonal.double() * share
    energy = float(diagonal.sum()) + sum(float(part.square().sum()) for part in rows)
    energy += 0.0 if matrix is None else float(matrix.trace())
    if not energy:
        return None
    return SecondMoment(
        diagonal + RIDGE * energy / width, torch.cat(rows) if rows else None, matrix
    )
