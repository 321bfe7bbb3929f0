"""Values of a planned tensor, in the base and in an expert: flat ranges, and maps [out, in]."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from eutectic.checkpoint.experts import Expert
from eutectic.errors import NumericalError
from eutectic.methods.linear import finite
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import CHUNK, FilledRows, Source, TensorPlan, chunk_entries


def read_stored(
    source: Source, inputs: Inputs, start: int, stop: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Read a flat range of the base in the file's dtype, or in `dtype`.

    Rows that it lacks are what its map fills them with, or zeros.
    """
    assert source.tensor is not None
    name, reader = source.tensor, inputs.base
    kept = dtype or reader.entries[name].dtype
    if source.rows is None:
        return reader.read(name, start, stop).to(kept)
    values = torch.zeros(stop - start, dtype=kept)
    _fill(values, source, inputs, start)
    return _placed(source, start, stop, lambda a, b, _: reader.read(name, a, b), values)


def _fill(values: Tensor, source: Source, inputs: Inputs, start: int) -> None:
    """Write the mean of donors' rows over what a source lacks of a flat range."""
    if source.rows is None:
        return
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    for place, offset, rows in source.rows.gaps(start, start + values.numel()):
        count = place.stop - place.start
        if rows.average:
            row = _mean_row(source, rows, inputs, wide)
            places = torch.arange(offset, offset + count) % len(row)
            values[place] = row[places].to(values.dtype)
            continue
        total = torch.zeros(count, dtype=wide)
        for donor in rows.donors:
            first = donor.row * source.rows.width + offset
            reader = inputs.base if donor.owner == "base" else inputs.experts[donor.owner]
            total += reader.read(donor.tensor, first, first + count).to(wide)
        values[place] = total.div_(max(len(rows.donors), 1)).to(values.dtype)


def _mean_row(source: Source, rows: FilledRows, inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """Return the mean of the rows before some rows of the output, as a source has them."""
    assert source.rows is not None
    width = source.rows.width
    total = torch.zeros(width, dtype=torch.float64)
    step = max(1, CHUNK // width) * width
    for start in range(0, rows.first * width, step):
        stop = min(rows.first * width, start + step)
        behind = torch.zeros(stop - start, dtype=dtype)
        if rows.behind is not None:
            behind = read_stored(rows.behind, inputs, start, stop, dtype)
        if source.owner == "base":
            values = read_stored(source, inputs, start, stop, dtype)
        else:
            values = read_weight(inputs, source, (start, stop), behind, dtype)
        total += values.view(-1, width).sum(0, dtype=torch.float64)
    return total.div_(max(rows.first, 1)).to(dtype)


def read_base(planned: TensorPlan, inputs: Inputs, start: int, stop: int) -> Tensor:
    """Read a flat range of the base in the dtype of the arithmetic; zeros where it has none."""
    if planned.base is None or planned.base.tensor is None:
        return torch.zeros(stop - start, dtype=planned.compute)
    return read_stored(planned.base, inputs, start, stop, planned.compute)


def read_delta(expert: Expert, source: Source, start: int, base: Tensor, inputs: Inputs) -> Tensor:
    """Read a flat range of Δ_t from `start` on; `base` is that range of W₀, and sets the dtype.

    Zero where the expert counts as unchanged: a tensor that it lacks, rows that it lacks.
    """
    if source.tensor is None:
        return torch.zeros_like(base)
    name, stop = source.tensor, start + base.numel()
    if source.rows is None:
        return expert.delta(name, start, stop, base=base, dtype=base.dtype)

    def read(first: int, last: int, place: slice) -> Tensor:
        return expert.delta(name, first, last, base=base[place], dtype=base.dtype)

    absent = base.clone()
    _fill(absent, source, inputs, start)
    return _placed(source, start, stop, read, absent.sub_(base))


def read_weight(
    inputs: Inputs, source: Source, span: tuple[int, int], base: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Read a flat range of W_t in `dtype`; `base` may be left out where the expert has it all."""
    expert = inputs.owner(source)
    if source.tensor is None:
        assert base is not None
        return base
    name = source.tensor
    if source.rows is None:
        return expert.weight(name, *span, base=base, dtype=dtype)
    assert base is not None

    def read(first: int, last: int, place: slice) -> Tensor:
        return expert.weight(name, first, last, base=base[place], dtype=dtype)

    values = base.clone()
    _fill(values, source, inputs, span[0])
    return _placed(source, *span, read, values)


def read_own(expert: Expert, source: Source, start: int, base: Tensor) -> Tensor:
    """Read a flat range that an expert stores in full, in the base's dtype; else the base's."""
    name = source.tensor
    assert name is not None

    def read(first: int, last: int, place: slice) -> Tensor:
        return expert.read(name, first, last).to(base.dtype)

    return _placed(source, start, start + base.numel(), read, base.clone())


def _placed(
    source: Source, start: int, stop: int, read: Callable[[int, int, slice], Tensor], absent: Tensor
) -> Tensor:
    """Read a flat range of the output where its rows lie; `absent` holds what the others get."""
    if source.rows is None:
        return read(start, stop, slice(None))
    for place, first, last in source.rows.ranges(start, stop):
        absent[place] = read(first, last, place)
    return absent


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
    """
    start, stop = span
    stack = torch.empty(len(planned.experts), stop - start, dtype=planned.compute)
    for row, source in enumerate(planned.experts):
        if weights:
            stack[row] = read_weight(inputs, source, span, base, planned.compute)
        else:
            assert base is not None
            stack[row] = read_delta(inputs.owner(source), source, start, base, inputs)
    if planned.nonfinite == "error":
        check_finite(stack, planned, base)
    return stack


def check_finite(
    rows: Tensor | Sequence[Tensor], planned: TensorPlan, base: Tensor | None = None
) -> None:
    """Refuse NaN and Inf in what was read: a row an expert, and the base."""
    if base is not None and not finite(base):
        culprit = "the base"
    elif finite(rows) if isinstance(rows, Tensor) else all(map(finite, rows)):
        return
    else:
        bad = [s.owner for s, row in zip(planned.experts, rows, strict=True) if not finite(row)]
        culprit = "expert " + ", ".join(f"'{n}'" for n in bad)
    raise NumericalError(
        f"{planned.name}: NaN or Inf in {culprit}.\n"
        "Repair the checkpoint, leave the expert out, or set nonfinite: allow."
    )


def flat_ranges(length: int, step: int = 0) -> Iterator[tuple[int, int]]:
    """Yield flat ranges of at most `step` entries, or `CHUNK`; an empty tensor has an empty one."""
    step = step or CHUNK
    for start in range(0, max(length, 1), step):
        yield start, min(length, start + step)


def merged_ranges(planned: TensorPlan) -> Iterator[tuple[int, int]]:
    """Yield the flat ranges in which a method that works entry by entry sees a tensor."""
    return flat_ranges(planned.elements, chunk_entries(planned, CHUNK))


def block_ranges(planned: TensorPlan) -> Iterator[tuple[int, int]]:
    """Yield flat ranges of at most `CHUNK` entries that end where a matrix of a stack ends.

    Vectorised kernels round the end of a range differently: these give the bytes of a merge in one.
    """
    _, size = planned.blocks
    for first in range(0, planned.elements, max(size, 1)):
        for start in range(first, first + size, CHUNK):
            yield start, min(first + size, start + CHUNK)


def as_map(values: Tensor, planned: TensorPlan) -> Tensor:
    """View flat values `[…, n]` of one matrix as the linear map `[…, out, in]`.

    A transposed convolution of several groups keeps them one below the other, each `[in, out]`; as
    maps they are again one below the other.
    """
    matrix = values.view((*values.shape[:-1], *planned.matrix_shape))
    if not planned.layout.transpose:
        return matrix
    return _groups_turned(matrix, planned.layout.groups)


def as_stored(matrix: Tensor, planned: TensorPlan) -> Tensor:
    """Return the flat values of a linear map `[out, in]` as the file lays them out."""
    if planned.layout.transpose:
        matrix = _groups_turned(matrix, planned.layout.groups)
    return matrix.contiguous().flatten()


def _groups_turned(matrix: Tensor, groups: int) -> Tensor:
    """Turn each of the matrices that lie one below the other in `[…, groups·rows, columns]`."""
    if groups == 1:
        return matrix.mT
    *lead, height, columns = matrix.shape
    turned = matrix.reshape(*lead, groups, height // groups, columns).mT
    return turned.reshape(*lead, groups * columns, height // groups)
