"""A tensor merged as matrices, and the statistics and thin factors that come with them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.experts import Expert
from eutectic.conventions import PARTS, is_packed
from eutectic.errors import NumericalError
from eutectic.execution.grouped_kernels import by_groups
from eutectic.execution.norms import Squares, squares_of
from eutectic.execution.tensor_values import (
    as_map,
    as_stored,
    check_finite,
    read_base,
    read_delta,
    read_stack,
)
from eutectic.linalg.lowrank import LowRankStack
from eutectic.methods import Context, get_method
from eutectic.methods.matrices import run_method
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import Source, TensorPlan
from eutectic.types import LayerStatistics, Merged

PerExpert = tuple[LayerStatistics | None, ...] | None


def statistics_of(planned: TensorPlan, inputs: Inputs, part: str = "") -> PerExpert:
    """Return the statistics of a matrix, or of a part of a packed one, for each of its experts.

    No more is read than the tensor's method may ask for.
    """
    if not inputs.statistics or planned.layout.stacked:
        return None
    only = planned.needs
    after = frozenset[str]() if planned.post is None else planned.post.needs
    if get_method(planned.method).core_grams and "gram" not in after:
        only |= {"core_gram"}
    found: list[LayerStatistics | None] = []
    for source in planned.experts:
        inside = source.statistics.get(part)
        if inside is None:
            found.append(None)
            continue
        entry = inputs.statistics[source.owner].read(inside, only, in_rows=True)
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
    fisher = as_map(fisher.reshape(-1), planned)
    return dataclasses.replace(entry, fisher_diagonal=fisher)


def _rows_of(entry: LayerStatistics | None, rows: slice) -> LayerStatistics | None:
    if entry is None:
        return None
    outer, fisher = entry.output_gradient_gram, entry.fisher_diagonal
    factor, rest = entry.output_gradient_factor, entry.output_gradient_diagonal
    return dataclasses.replace(
        entry,
        output_gradient_gram=None if outer is None else outer[rows, rows],
        output_gradient_factor=None if factor is None else factor[:, rows],
        output_gradient_diagonal=None if rest is None else rest[rows],
        fisher_diagonal=None if fisher is None else fisher[rows],
    )


def _joined(whole: LayerStatistics | None, part: LayerStatistics | None) -> LayerStatistics | None:
    """Return the part's Grams, beside what was collected of the whole parameter only."""
    if whole is None or part is None:
        return part or whole
    if whole.has("gram"):
        return whole
    return dataclasses.replace(part, fisher_diagonal=whole.fisher_diagonal)


def context_of(planned: TensorPlan, state: Any = None) -> Context:
    """Return the context of one tensor without what only matrices need."""
    return Context(
        weights=tuple(source.weight for source in planned.experts),
        experts=tuple(source.owner for source in planned.experts),
        tensor=planned.seed_name,
        seed=planned.seed,
        precision=planned.precision,
        own=tuple(source.parameters for source in planned.experts),
        shape=planned.shape,
        state=state,
    )


def merge_matrices(
    planned: TensorPlan, inputs: Inputs, squares: Squares
) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """Yield (flat start, merged flat delta, record) of each matrix in a tensor, in file order.

    What each says of the size of its change is added to `squares`.
    """
    blocks, size = planned.blocks
    context = context_of(planned)
    for block in range(blocks):
        start = block * size
        base = read_base(planned, inputs, start, start + size)
        deltas = _thin(planned, inputs, base)
        if deltas is None:
            stack = read_stack(planned, inputs, (start, start + size), base, weights=False)
            deltas = as_map(stack, planned).to(inputs.device)
        initial = None
        if planned.initial is not None:
            expert = inputs.owner(planned.initial)
            flat = read_delta(expert, planned.initial, start, base, inputs)
            initial = as_map(flat, planned).to(inputs.device)
        suffix = f"[{block}]" if blocks > 1 else ""
        own = dataclasses.replace(
            context,
            tensor=context.tensor + suffix,
            base=as_map(base, planned).to(inputs.device),
            initial=initial,
            statistics=statistics_of(planned, inputs),
        )
        merged, record = merge_parts(planned, inputs, deltas, own, suffix)
        measured = planned.base is not None  # else there is no change to measure
        for part, rows in planned.row_parts(len(merged) if merged.ndim else 1) if measured else ():
            seen, near, result = deltas, own.base, merged
            if planned.layout.split:
                seen = some_rows(deltas, rows)
                near, result = None if near is None else near[rows], merged[rows]
            squares[suffix + part] = squares_of(seen, near, result)
        yield start, as_stored(merged, planned).cpu(), record


def _thin(planned: TensorPlan, inputs: Inputs, base: Tensor) -> LowRankStack | None:
    """Return the deltas as thin factors, where the method takes them and every expert has them.

    The matrices of a stack are merged from expanded deltas.
    """
    if not get_method(planned.method).factors:
        return None
    return thin_deltas(planned, inputs, base)


def thin_deltas(
    planned: TensorPlan, inputs: Inputs, base: Tensor | None = None
) -> LowRankStack | None:
    """Return the deltas as thin factors `[out, r_t]` and `[r_t, in]`, where every expert has them.

    `base` is W₀, named where it is what is not finite.
    """
    layout = planned.layout
    if layout.stacked:
        return None
    pairs: list[tuple[Tensor, Tensor]] = []
    for source in planned.experts:
        pair = _factors(planned, source, inputs.owner(source))
        if pair is None:
            return None
        left, right = (factor.to(inputs.device) for factor in pair)
        pairs.append((right.mT, left.mT) if layout.transpose else (left, right))
    if planned.nonfinite == "error":
        check_finite([torch.cat([f.flatten() for f in pair]) for pair in pairs], planned, base)
    return LowRankStack(*(tuple(side) for side in zip(*pairs, strict=True)))


def _factors(planned: TensorPlan, source: Source, expert: Expert) -> tuple[Tensor, Tensor] | None:
    """Return the factors of one expert's delta as the file lays it out; of rank 0 where it is 0."""
    if source.rows is not None or source.tensor is None or len(planned.shape) != 2:
        return None
    if expert.is_delta and source.tensor not in expert.entries:
        rows, columns = planned.shape
        zeros = torch.zeros(rows, 0, dtype=planned.compute)
        return zeros, torch.zeros(0, columns, dtype=planned.compute)
    return expert.factors(source.tensor, planned.compute)


def some_rows(deltas: Tensor | LowRankStack, rows: slice) -> Tensor | LowRankStack:
    """Return some output rows of every delta."""
    return deltas.rows(rows) if isinstance(deltas, LowRankStack) else deltas[:, rows]


def merge_parts(
    planned: TensorPlan,
    inputs: Inputs,
    deltas: Tensor | LowRankStack,
    context: Context,
    suffix: str,
) -> tuple[Tensor, dict[str, Any]]:
    """Merge one matrix `[T, out, in]`, part by part where it is a fused one."""
    if planned.layout.groups > 1:

        def of_rows(_: slice, seen: Tensor, own: Context) -> tuple[Tensor, Mapping[str, Any]]:
            result = run_checked(planned, seen, own)
            return result.delta, result.record

        kernel, record = by_groups(deltas, context, planned.layout.groups, of_rows)
        return kernel, {suffix or "matrix": record} if record else {}
    if not planned.layout.split:
        result = run_checked(planned, deltas, context)
        return result.delta, {suffix or "matrix": result.record} if result.record else {}
    base, initial = context.base, context.initial
    assert base is not None
    merged: list[Tensor] = []
    records: dict[str, Any] = {}
    for part, rows in planned.row_parts(len(base)):
        own = dataclasses.replace(
            context,
            tensor=context.tensor + part,
            base=base[rows],
            initial=None if initial is None else initial[rows],
            statistics=part_statistics(planned, inputs, context.statistics, rows),
        )
        result = run_checked(planned, some_rows(deltas, rows), own)
        merged.append(result.delta)
        if result.record:
            records[suffix + part] = result.record
    return torch.cat(merged), records


def run_checked(planned: TensorPlan, deltas: Tensor | LowRankStack, context: Context) -> Merged:
    """Run the tensor's method; errors of its numbers name the tensor."""
    try:
        return run_method(get_method(planned.method), deltas, planned.parameters, context)
    except NumericalError as error:
        if context.tensor in str(error):
            raise
        raise NumericalError(f"{context.tensor}: {error}") from error
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise NumericalError(
            f"{context.tensor}: {planned.method} cannot decompose this matrix ({error}).\n"
            "If it holds NaN or Inf, repair the checkpoint, or give the tensor a rule with "
            "treatment vector."
        ) from error
