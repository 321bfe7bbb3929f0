"""A tensor merged entry by entry, in chunks that fit the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from eutectic.execution.stacks import context_for, read_stack
from eutectic.methods import Method
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.planning.tensors import TensorPlan
from eutectic.planning.values import flat_ranges, read_base


def stream_chunks(
    planned: TensorPlan, method: Method, parameters: Any, plan: Plan, inputs: Inputs
) -> Iterator[Tensor]:
    """Yield `[T, n]` chunks of what the method takes: deltas, or weights."""
    for start, stop in flat_ranges(planned.elements):
        stack, _ = _read_chunk(planned, method, parameters, plan, inputs, start, stop)
        yield stack


def merge_elementwise(
    planned: TensorPlan,
    method: Method,
    parameters: Any,
    plan: Plan,
    inputs: Inputs,
    state: Any,
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield (flat start, merged delta or weight, base or None) of each chunk."""
    context = context_for(planned, plan, state)
    ranges = list(flat_ranges(planned.elements))
    small = len(ranges) == 1
    stack, base = None, None
    if small:
        stack, base = _read_chunk(planned, method, parameters, plan, inputs, *ranges[0])
    if method.prepare is not None and state is None:
        whole = stack

        def chunks() -> Iterator[Tensor]:
            if whole is not None:
                return iter([whole])
            return stream_chunks(planned, method, parameters, plan, inputs)

        context = dataclasses.replace(context, state=method.prepare(chunks, parameters, context))
    for start, stop in ranges:
        if not small:
            stack, base = _read_chunk(planned, method, parameters, plan, inputs, start, stop)
        assert stack is not None
        result = method.function(stack, parameters, dataclasses.replace(context, offset=start))
        assert isinstance(result, Tensor)
        yield start, result, base


def _read_chunk(
    planned: TensorPlan,
    method: Method,
    parameters: Any,
    plan: Plan,
    inputs: Inputs,
    start: int,
    stop: int,
) -> tuple[Tensor, Tensor | None]:
    """Read one flat range of every expert as `[T, n]` deltas or weights, and of the base."""
    in_weights = method.space(parameters) != "delta"
    experts = [inputs.experts[name] for name in planned.experts]
    full = all(not e.is_delta and planned.name in e.entries for e in experts)
    base = None
    if not (in_weights and full and planned.scale == 1):
        base = read_base(planned, inputs, start, stop)
    return read_stack(planned, plan, inputs, start, stop, base, weights=in_weights), base
