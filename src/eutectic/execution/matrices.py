"""A tensor merged as matrices: one, a stack of them, or the parts of a fused one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from eutectic.errors import NumericalError
from eutectic.execution.stacks import context_for, read_stack
from eutectic.methods import Context, Method
from eutectic.methods.matrices import run_method
from eutectic.planning.evidence import part_statistics, statistics_of
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.planning.tensors import TensorPlan
from eutectic.planning.values import as_map, blocks_of, read_base, read_delta, row_parts
from eutectic.types import Merged


def merge_matrices(
    planned: TensorPlan, method: Method, parameters: Any, plan: Plan, inputs: Inputs
) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    """Yield (flat start, merged flat delta, record) of each matrix in a tensor, in file order."""
    blocks, size = blocks_of(planned)
    for block in range(blocks):
        start = block * size
        base = read_base(planned, inputs, start, start + size)
        deltas = read_stack(planned, plan, inputs, start, start + size, base)
        initial = None
        if inputs.initial is not None and method is plan.method:
            flat = read_delta(inputs.initial, planned, start, start + size, base)
            initial = as_map(flat, planned)
        merged, record = _merge_parts(
            planned,
            method,
            parameters,
            plan,
            inputs,
            as_map(deltas, planned),
            as_map(base, planned),
            initial,
            f"[{block}]" if blocks > 1 else "",
        )
        if planned.decision.transpose:
            merged = merged.mT
        yield start, merged.contiguous().flatten(), record


def _merge_parts(
    planned: TensorPlan,
    method: Method,
    parameters: Any,
    plan: Plan,
    inputs: Inputs,
    deltas: Tensor,
    weight: Tensor,
    initial: Tensor | None,
    suffix: str,
) -> tuple[Tensor, dict[str, Any]]:
    """Merge one matrix `[T, out, in]`, part by part where it is a fused one."""
    statistics = statistics_of(planned, plan, inputs)
    context = context_for(planned, plan)
    if not planned.decision.split:
        own = dataclasses.replace(
            context,
            tensor=context.tensor + suffix,
            base=weight,
            initial=initial,
            statistics=statistics,
        )
        result = _run(method, deltas, parameters, own)
        return result.delta, {suffix or "matrix": result.record} if result.record else {}
    merged: list[Tensor] = []
    records: dict[str, Any] = {}
    for part, rows in row_parts(planned, len(weight)):
        label = suffix + part
        own = dataclasses.replace(
            context,
            tensor=context.tensor + label,
            base=weight[rows],
            initial=None if initial is None else initial[rows],
            statistics=part_statistics(planned, plan, inputs, statistics, rows),
        )
        result = _run(method, deltas[:, rows], parameters, own)
        merged.append(result.delta)
        if result.record:
            records[label] = result.record
    return torch.cat(merged), records


def _run(method: Method, deltas: Tensor, parameters: Any, context: Context) -> Merged:
    try:
        return run_method(method, deltas, parameters, context)
    except NumericalError as error:
        if context.tensor in str(error):
            raise
        raise NumericalError(f"{context.tensor}: {error}") from error
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise NumericalError(
            f"{context.tensor}: {method.name} cannot decompose this matrix ({error}).\n"
            "If it holds NaN or Inf, repair the checkpoint, or give the tensor a rule with "
            "treatment copy or vector."
        ) from error
