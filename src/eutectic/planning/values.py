"""Values of a planned tensor, in the base and in an expert: flat ranges, and maps [out, in]."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from eutectic.checkpoint.experts import Expert
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensors import TensorPlan, stored_name
from eutectic.types import Treatment

CHUNK = 1 << 17  # entries of one tensor merged at a time: 8 experts' chunks fit the cache


def read_base(planned: TensorPlan, inputs: Inputs, start: int, stop: int) -> Tensor:
    """Read a flat range of the base in the dtype of the arithmetic."""
    return inputs.base.read(planned.name, start, stop).to(planned.compute)


def read_delta(expert: Expert, planned: TensorPlan, start: int, stop: int, base: Tensor) -> Tensor:
    """Read a flat range of an expert's Δ_t in the dtype of the arithmetic; `base` is that range."""
    name = stored_name(expert, planned.name, planned.seed_name)
    if _lacks(expert, name):
        return torch.zeros_like(base)
    return expert.delta(name, start, stop, base=base, dtype=planned.compute)


def read_weight(
    expert: Expert, planned: TensorPlan, start: int, stop: int, base: Tensor | None
) -> Tensor:
    """Read a flat range of an expert's W_t; `base` may be left out where the expert has it all."""
    name = stored_name(expert, planned.name, planned.seed_name)
    if _lacks(expert, name):
        assert base is not None
        return base
    return expert.weight(name, start, stop, base=base, dtype=planned.compute)


def _lacks(expert: Expert, name: str) -> bool:
    """Tell whether an expert counts as unchanged here (`missing: base`)."""
    return not expert.is_delta and name not in expert.entries


def flat_ranges(length: int) -> Iterator[tuple[int, int]]:
    """Yield flat ranges of at most `CHUNK` entries; an empty tensor has one empty range."""
    for start in range(0, max(length, 1), CHUNK):
        yield start, min(length, start + CHUNK)


def blocks_of(planned: TensorPlan) -> tuple[int, int]:
    """Return how many matrices a tensor stacks, and the entries of one; 1 unless it is a stack."""
    count = planned.entry.shape[0] if planned.decision.stacked else 1
    return count, planned.elements // max(count, 1)


def block_ranges(planned: TensorPlan) -> Iterator[tuple[int, int]]:
    """Yield flat ranges of at most `CHUNK` entries that end where a matrix of a stack ends.

    Vectorised kernels may round the last few entries of a range differently; with the ends of
    these ranges, the result has the bytes of a merge in one go.
    """
    _, size = blocks_of(planned)
    for first in range(0, planned.elements, max(size, 1)):
        for start in range(first, first + size, CHUNK):
            yield start, min(first + size, start + CHUNK)


def matrix_shape(planned: TensorPlan) -> tuple[int, ...]:
    """Return the shape of one matrix of a tensor, as the file lays it out.

    Tables and convolutions are no linear maps: what merges them sees entries in a row.
    """
    shape = planned.entry.shape
    if planned.decision.treatment in (Treatment.EMBEDDING, Treatment.CONV):
        return (planned.elements,)
    if planned.decision.stacked:
        return shape[1:]
    if len(shape) > 2:
        return (shape[0], planned.elements // shape[0])
    return shape


def as_map(values: Tensor, planned: TensorPlan) -> Tensor:
    """View flat values `[…, n]` of one matrix as the linear map `[…, out, in]`."""
    matrix = values.view((*values.shape[:-1], *matrix_shape(planned)))
    return matrix.mT if planned.decision.transpose else matrix


def matrix_shapes(planned: TensorPlan) -> list[tuple[int, int]]:
    """Return [out, in] of each matrix that a method sees of this tensor."""
    *_, rows, columns = matrix_shape(planned)
    if planned.decision.transpose:
        rows, columns = columns, rows
    return [(height, columns) for height in planned.decision.split or (rows,)]


def row_parts(planned: TensorPlan, rows: int) -> Iterator[tuple[str, slice]]:
    """Yield (label, rows) of the parts of a fused matrix, or the whole under an empty label."""
    if not planned.decision.split:
        yield "", slice(0, rows)
    start = 0
    for part, height in enumerate(planned.decision.split):
        yield f"[{part}]", slice(start, start + height)
        start += height
