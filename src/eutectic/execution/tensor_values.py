"""Values of a planned tensor, in the base and in an expert: flat ranges, and maps [out, in]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from eutectic.checkpoint.experts import Expert
from eutectic.errors import NumericalError
from eutectic.methods.linear import finite
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import CHUNK, Source, TensorPlan


def read_base(planned: TensorPlan, inputs: Inputs, start: int, stop: int) -> Tensor:
    """Read a flat range of the base in the dtype of the arithmetic; zeros where it has none."""
    source = planned.base
    if source is None or source.tensor is None:
        return torch.zeros(stop - start, dtype=planned.compute)
    if source.rows is None:
        return inputs.base.read(source.tensor, start, stop).to(planned.compute)
    values = torch.zeros(stop - start, dtype=planned.compute)
    for place, first, last in source.rows.ranges(start, stop):
        values[place] = inputs.base.read(source.tensor, first, last).to(planned.compute)
    return values


def read_delta(expert: Expert, source: Source, start: int, base: Tensor) -> Tensor:
    """Read a flat range of Δ_t from `start` on; `base` is that range of W₀, and sets the dtype.

    Zero where the expert counts as unchanged: a tensor that it lacks, rows that it lacks.
    """
    if source.tensor is None:
        return torch.zeros_like(base)
    stop = start + base.numel()
    if source.rows is None:
        return expert.delta(source.tensor, start, stop, base=base, dtype=base.dtype)
    delta = torch.zeros_like(base)
    for place, first, last in source.rows.ranges(start, stop):
        delta[place] = expert.delta(source.tensor, first, last, base=base[place], dtype=base.dtype)
    return delta


def read_weight(
    expert: Expert, source: Source, span: tuple[int, int], base: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Read a flat range of W_t in `dtype`; `base` may be left out where the expert has it all."""
    start, stop = span
    if source.tensor is None:
        assert base is not None
        return base
    if source.rows is None:
        return expert.weight(source.tensor, start, stop, base=base, dtype=dtype)
    assert base is not None
    values = base.clone()
    for place, first, last in source.rows.ranges(start, stop):
        values[place] = expert.weight(source.tensor, first, last, base=base[place], dtype=dtype)
    return values


def reads_no_base(planned: TensorPlan, inputs: Inputs) -> bool:
    """Tell whether every expert has all of its W_t without the base's values."""
    return all(
        s.tensor is not None and s.rows is None and not inputs.owner(s).is_delta
        for s in planned.experts
    )


def read_stack(
    planned: TensorPlan, inputs: Inputs, span: tuple[int, int], base: Tensor | None, weights: bool
) -> Tensor:
    """Read one flat range of every expert as `[T, n]` deltas, or as weights.

    `base` is that range of the base; weights do without where `reads_no_base`.

    Raises:
        NumericalError: NaN or Inf, unless the plan allows it.
    """
    start, stop = span
    stack = torch.empty(len(planned.experts), stop - start, dtype=planned.compute)
    for row, source in enumerate(planned.experts):
        expert = inputs.owner(source)
        if weights:
            stack[row] = read_weight(expert, source, span, base, planned.compute)
        else:
            assert base is not None
            stack[row] = read_delta(expert, source, start, base)
    if planned.nonfinite == "error":
        check_finite(stack, planned, base)
    return stack


def check_finite(
    rows: Tensor | Sequence[Tensor], planned: TensorPlan, base: Tensor | None = None
) -> None:
    """Refuse NaN and Inf in what was read: a row an expert, and the base.

    Raises:
        NumericalError: naming who holds them.
    """
    sound = finite(rows) if isinstance(rows, Tensor) else all(map(finite, rows))
    if sound and (base is None or finite(base)):
        return
    if base is not None and not finite(base):
        culprit = "the base"
    else:
        bad = [s.owner for s, row in zip(planned.experts, rows, strict=True) if not finite(row)]
        culprit = "expert " + ", ".join(f"'{n}'" for n in bad)
    raise NumericalError(
        f"{planned.name}: NaN or Inf in {culprit}.\n"
        "Repair the checkpoint, leave the expert out, or set nonfinite: allow."
    )


def flat_ranges(length: int) -> Iterator[tuple[int, int]]:
    """Yield flat ranges of at most `CHUNK` entries; an empty tensor has one empty range."""
    for start in range(0, max(length, 1), CHUNK):
        yield start, min(length, start + CHUNK)


def block_ranges(planned: TensorPlan) -> Iterator[tuple[int, int]]:
    """Yield flat ranges of at most `CHUNK` entries that end where a matrix of a stack ends.

    Vectorised kernels may round the last few entries of a range differently; with the ends of
    these ranges, the result has the bytes of a merge in one go.
    """
    _, size = planned.blocks
    for first in range(0, planned.elements, max(size, 1)):
        for start in range(first, first + size, CHUNK):
            yield start, min(first + size, start + CHUNK)


def as_map(values: Tensor, planned: TensorPlan) -> Tensor:
    """View flat values `[…, n]` of one matrix as the linear map `[…, out, in]`."""
    matrix = values.view((*values.shape[:-1], *planned.matrix_shape))
    return matrix.mT if planned.layout.transpose else matrix
