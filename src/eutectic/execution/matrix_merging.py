"""A tensor merged as matrices: one, a stack of them, or the parts of a fused one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from eutectic.errors import NumericalError
from eutectic.execution.elementwise_merging import context_of
from eutectic.execution.tensor_statistics import part_statistics, statistics_of
from eutectic.execution.tensor_values import as_map, read_base, read_delta, read_stack
from eutectic.methods import Context, get_method
from eutectic.methods.matrices import run_method
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.types import Merged


def merge_matrices(
    planned: TensorPlan, inputs: Inputs
) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """Yield (flat start, merged flat delta, record) of each matrix in a tensor, in file order."""
    blocks, size = planned.blocks
    context = context_of(planned)
    for block in range(blocks):
        start = block * size
        base = read_base(planned, inputs, start, start + size)
        deltas = read_stack(planned, inputs, (start, start + size), base, weights=False)
        initial = None
        if planned.initial is not None:
            flat = read_delta(inputs.owner(planned.initial), planned.initial, start, base)
            initial = as_map(flat, planned).to(inputs.device)
        suffix = f"[{block}]" if blocks > 1 else ""
        own = dataclasses.replace(
            context,
            tensor=context.tensor + suffix,
            base=as_map(base, planned).to(inputs.device),
            initial=initial,
            statistics=statistics_of(planned, inputs),
        )
        stack = as_map(deltas, planned).to(inputs.device)
        merged, record = _merge_parts(planned, inputs, stack, own, suffix)
        if planned.layout.transpose:
            merged = merged.mT
        yield start, merged.contiguous().flatten().cpu(), record


def _merge_parts(
    planned: TensorPlan, inputs: Inputs, deltas: Tensor, context: Context, suffix: str
) -> tuple[Tensor, dict[str, Any]]:
    """Merge one matrix `[T, out, in]`, part by part where it is a fused one."""
    if not planned.layout.split:
        result = _run(planned, deltas, context)
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
        result = _run(planned, deltas[:, rows], own)
        merged.append(result.delta)
        if result.record:
            records[suffix + part] = result.record
    return torch.cat(merged), records


def _run(planned: TensorPlan, deltas: Tensor, context: Context) -> Merged:
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
            "treatment copy or vector."
        ) from error
