"""A tensor merged entry by entry, in chunks that fit the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from eutectic.execution.tensor_values import flat_ranges, read_base, read_stack, reads_no_base
from eutectic.methods import Context, get_method
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import TensorPlan


def context_of(planned: TensorPlan, state: Any = None) -> Context:
    """Return the context of one tensor without what only matrices need."""
    return Context(
        weights=tuple(source.weight for source in planned.experts),
        experts=tuple(source.owner for source in planned.experts),
        tensor=planned.seed_name,
        seed=planned.seed,
        precision=planned.precision,
        own=tuple(source.parameters for source in planned.experts),
        state=state,
    )


def stream_chunks(planned: TensorPlan, inputs: Inputs) -> Iterator[Tensor]:
    """Yield `[T, n]` chunks of what the method takes: deltas, or weights."""
    for start, stop in flat_ranges(planned.elements):
        stack, _ = _read_chunk(planned, inputs, start, stop)
        yield stack.to(inputs.device)


def merge_elementwise(
    planned: TensorPlan, inputs: Inputs, state: Any
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield (flat start, merged delta or weight, base or None) of each chunk."""
    method, parameters = get_method(planned.method), planned.parameters
    context = context_of(planned, state)
    ranges = list(flat_ranges(planned.elements))
    small = len(ranges) == 1
    stack, base = None, None
    if small:
        stack, base = _read_chunk(planned, inputs, *ranges[0])
    if method.prepare is not None and state is None:
        whole = stack

        def chunks() -> Iterator[Tensor]:
            return (
                stream_chunks(planned, inputs) if whole is None else iter([whole.to(inputs.device)])
            )

        context = dataclasses.replace(context, state=method.prepare(chunks, parameters, context))
    for start, stop in ranges:
        if not small:
            stack, base = _read_chunk(planned, inputs, start, stop)
        assert stack is not None
        own = dataclasses.replace(context, offset=start)
        result = method.function(stack.to(inputs.device), parameters, own)
        assert isinstance(result, Tensor)
        yield start, result.cpu(), base


def _read_chunk(
    planned: TensorPlan, inputs: Inputs, start: int, stop: int
) -> tuple[Tensor, Tensor | None]:
    """Read one flat range of every expert as `[T, n]` deltas or weights, and of the base."""
    in_weights = get_method(planned.method).space(planned.parameters) != "delta"
    base = None
    if not (in_weights and planned.scale == 1 and reads_no_base(planned, inputs)):
        base = read_base(planned, inputs, start, stop)
    return read_stack(planned, inputs, (start, stop), base, in_weights), base
