"""What follows the merge of a tensor: its matrices, merged before, and the experts' once more.

The experts are read again instead of kept: the method may have seen them in chunks, or thin.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from eutectic.errors import NumericalError
from eutectic.execution.grouped_kernels import by_groups
from eutectic.execution.matrix_merging import (
    context_of,
    part_statistics,
    some_rows,
    statistics_of,
    thin_deltas,
)
from eutectic.execution.norms import Squares, squares_of
from eutectic.execution.tensor_values import as_map, as_stored, read_base, read_stack
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.methods import Context
from eutectic.methods.matrices import processed
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import TensorPlan


def process_matrices(
    planned: TensorPlan, inputs: Inputs, merged: Tensor, squares: Squares
) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """Yield (flat start, processed flat delta, record) of each matrix, in file order.

    `merged` is the tensor's flat delta before α. How large each change is, is added to `squares`.
    """
    blocks, size = planned.blocks
    for block in range(blocks):
        span = (block * size, (block + 1) * size)
        base = read_base(planned, inputs, *span)
        deltas: Tensor | LowRankStack | None = thin_deltas(planned, inputs, base)
        if deltas is None:
            stack = read_stack(planned, inputs, span, base, weights=False)
            deltas = as_map(stack, planned).to(inputs.device)
        suffix = f"[{block}]" if blocks > 1 else ""
        context = dataclasses.replace(
            context_of(planned),
            tensor=planned.seed_name + suffix,
            statistics=statistics_of(planned, inputs),
        )
        near = as_map(base, planned)
        matrix = as_map(merged[slice(*span)], planned).to(inputs.device)
        results: list[Tensor] = []
        record: dict[str, Any] = {}
        if planned.layout.groups > 1:
            of_rows = functools.partial(_of_rows, planned, matrix)
            kernel, told = by_groups(deltas, context, planned.layout.groups, of_rows)
            squares[suffix] = squares_of(deltas, near, kernel)
            yield span[0], as_stored(kernel, planned).cpu(), {suffix or "matrix": told}
            continue
        for part, rows in planned.row_parts(len(matrix)):
            seen = some_rows(deltas, rows) if part else deltas
            own = dataclasses.replace(context, tensor=context.tensor + part) if part else context
            if part:
                known = part_statistics(planned, inputs, context.statistics, rows)
                own = dataclasses.replace(own, statistics=known)
            result, told = _of_rows(planned, matrix, rows, seen, own)
            results.append(result)
            squares[suffix + part] = squares_of(seen, near[rows], result)
            record[suffix + part or "matrix"] = told
        yield span[0], as_stored(torch.cat(results), planned).cpu(), record


def _of_rows(
    planned: TensorPlan,
    merged: Tensor,
    rows: slice,
    deltas: Tensor | LowRankStack,
    context: Context,
) -> tuple[Tensor, dict[str, Any]]:
    """Return what the post-processor makes of some rows, whose deltas and context are given."""
    result, told = process(planned, merged[rows], deltas, context)
    assert isinstance(result, Tensor)
    return result, told


def process(
    planned: TensorPlan,
    merged: Tensor | LowRank,
    deltas: Tensor | LowRankStack,
    context: Context,
) -> tuple[Tensor | LowRank, dict[str, Any]]:
    """Return what the tensor's post-processor makes of one matrix, thin where it is."""
    assert planned.post is not None
    name = planned.post.name
    try:
        result, told = processed(planned.post, merged, deltas, context)
    except NumericalError as error:
        raise NumericalError(f"{context.tensor}: {error}") from error
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise NumericalError(
            f"{context.tensor}: {name} cannot decompose this matrix ({error}).\n"
            "If it holds NaN or Inf, repair the checkpoint; else leave post out."
        ) from error
    return result, {name: told}
