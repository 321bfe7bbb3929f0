"""A matrix merged at a rank: in bases of few directions that all experts share, found before.

"Compress then merge" (CtM, arXiv 2606.03723): what is merged has no more directions than the output
may have, so that nothing is cut afterwards.
"""

import dataclasses
from typing import Any

from torch import Tensor

from eutectic.execution.matrix_merging import (
    context_of,
    merge_parts,
    run_checked,
    some_rows,
    statistics_of,
    thin_deltas,
)
from eutectic.execution.norms import Squares, squares_of
from eutectic.execution.tensor_values import read_base, read_delta, read_stack
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.linalg.shared import SharedSpace, shared_space
from eutectic.linalg.svd import default_tolerance
from eutectic.methods import Context, get_method
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import TensorPlan

LOST = "lost_before"  # in a tensor's record: share of the experts' energy outside their bases


def merge_shared(
    planned: TensorPlan, inputs: Inputs, squares: Squares, block: int = 0
) -> tuple[Tensor | LowRank, dict[str, Any]]:
    """Return the merged change `[out, in]` before α, merged at the plan's rank, and a record.

    `block` is the number of the matrix in a stack.

    Methods merge the cores PᵀΔ_tQ `[R, R]`. Those that look at statistics, at W₀ or at a guess,
    and those of fused matrices, merge PPᵀΔ_tQQᵀ `[out, in]`, to which these belong. Where the
    experts have no more than R directions together, only element-wise methods need any bases.
    """
    assert planned.compress is not None
    blocks, size = planned.blocks
    span, label = (block * size, (block + 1) * size), f"[{block}]" if blocks > 1 else ""
    base = read_base(planned, inputs, *span)
    deltas: Tensor | LowRankStack | None = thin_deltas(planned, inputs, base)
    if deltas is None:
        stack = read_stack(planned, inputs, span, base, weights=False)
        deltas = _as_map(stack, planned).to(inputs.device)
    initial = None
    if planned.initial is not None:
        flat = read_delta(inputs.owner(planned.initial), planned.initial, span[0], base, inputs)
        initial = _as_map(flat, planned).to(inputs.device)
    context = context_of(planned)
    context = dataclasses.replace(
        context,
        tensor=context.tensor + label,
        base=_as_map(base, planned).to(inputs.device),
        initial=initial,
        statistics=statistics_of(planned, inputs),
    )
    merged, record = _merged(planned, inputs, deltas, context, label)
    for part, rows in planned.row_parts(merged.shape[0]) if planned.base is not None else ():
        near = None if context.base is None else context.base[rows]
        squares[label + part] = squares_of(some_rows(deltas, rows), near, _rows_of(merged, rows))
    return merged, record


def _merged(
    planned: TensorPlan,
    inputs: Inputs,
    deltas: Tensor | LowRankStack,
    context: Context,
    label: str,
) -> tuple[Tensor | LowRank, dict[str, Any]]:
    method, rank = get_method(planned.method), planned.compress or 0
    seen, record = deltas, {LOST: 0.0}
    if method.elementwise or _needs_cut(deltas, rank):
        shared = _shared(deltas, context, planned)
        record = {LOST: shared.lost}
        space = shared.space
        if not space.cores.numel():
            nothing = space.cores.new_zeros(space.cores.shape[1:])
            return space.expand(nothing), record
        narrow = deltas.dtype
        whole = shared.lost <= default_tolerance(narrow, deltas.shape[1:]) ** 2
        if method.elementwise or (_looks_at_nothing_else(planned) and not whole):
            # A matrix method tells rounding from directions by the dtype of what it gets.
            cores = space.cores if method.elementwise else space.cores.to(narrow)
            inside = dataclasses.replace(context, base=None, statistics=None, initial=None)
            found = run_checked(planned, cores, inside)
            told = {label or "matrix": found.record} if found.record else {}
            return space.expand(found.delta), {**told, **record}
        if not whole:  # dense experts may have no more directions either
            left = tuple((space.left @ core).to(narrow) for core in space.cores)
            seen = LowRankStack(left, (space.right.mT.to(narrow),) * len(left))
    if isinstance(seen, LowRankStack) and not planned.layout.split and method.thin is not None:
        merged = method.thin(seen, planned.parameters, context)
        if merged is not None:
            return merged, record
    result, told = merge_parts(planned, inputs, seen, context, label)
    return result, {**told, **record}


def _looks_at_nothing_else(planned: TensorPlan) -> bool:
    needs = planned.needs
    in_base = "base" in get_method(planned.method).needs(planned.parameters)
    return not (needs or in_base or planned.initial is not None or planned.layout.split)


def merge_shared_stack(
    planned: TensorPlan, inputs: Inputs, squares: Squares
) -> tuple[list[Tensor | LowRank], dict[str, Any]]:
    """Return the merged changes of all matrices of a tensor, and a record with their mean loss."""
    merged: list[Tensor | LowRank] = []
    record: dict[str, Any] = {}
    lost = 0.0
    for block in range(planned.blocks[0]):
        change, told = merge_shared(planned, inputs, squares, block)
        merged.append(change)
        lost += told.pop(LOST)
        record |= told
    return merged, {**record, LOST: lost / max(len(merged), 1)}


def _needs_cut(deltas: Tensor | LowRankStack, rank: int) -> bool:
    """Tell whether experts may have more directions together than the bases will."""
    own = deltas.rank if isinstance(deltas, LowRankStack) else min(deltas.shape[1:])
    return own > rank


def _shared(deltas: Tensor | LowRankStack, context: Context, planned: TensorPlan) -> SharedSpace:
    return shared_space(
        deltas,
        planned.compress or 0,
        weights=context.weights,
        tolerance=default_tolerance(deltas.dtype, deltas.shape[1:]),
        balance=planned.balance,
        seed=context.seed_for("shared"),
    )


def _as_map(values: Tensor, planned: TensorPlan) -> Tensor:
    """Lay flat values, or `[T, n]`, out as `[out, in]`; of a table the rows are the outputs."""
    rows = planned.shape[1 if planned.layout.stacked else 0]
    shaped = values.reshape(*values.shape[:-1], rows, -1)
    return shaped.mT if planned.layout.transpose else shaped


def _rows_of(merged: Tensor | LowRank, rows: slice) -> Tensor:
    if isinstance(merged, LowRank):
        return LowRank(merged.left[rows], merged.right).dense()
    return merged[rows]
