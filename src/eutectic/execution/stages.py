"""The stages of a merge over opened files: every tensor once, then what compares layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.layout import OutputFile
from eutectic.errors import RequestError
from eutectic.execution.compute import (
    Emit,
    Outcome,
    copy_tensor,
    merge_tensor,
    merge_unscaled,
    narrow,
    scaled,
)
from eutectic.execution.elementwise import stream_chunks
from eutectic.execution.factors import layer_factors, range_factor, with_factors
from eutectic.execution.jobs import Ledger, Limits, Run, Sink
from eutectic.execution.local import one_intra_op_thread
from eutectic.execution.stacks import context_for
from eutectic.methods import get_method
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.planning.tensors import TensorPlan
from eutectic.planning.values import block_ranges, read_base
from eutectic.recipes.schema import ScaleSearch
from eutectic.types import Treatment

DELTAS = "deltas.safetensors"

Scratch = Callable[[OutputFile], AbstractContextManager[Sink]]


def run_stages(
    plan: Plan,
    inputs: Inputs,
    writer: Sink,
    journal: Ledger,
    limits: Limits,
    scratch: Scratch,
) -> None:
    """Write every tensor of the plan; finished ones are checked by their hash and skipped.

    Methods that compare layers (`finish`) go through a scratch file of merged deltas: their
    matrices are merged once, and scaled when all norms are known.
    """
    refuse_search(plan)
    compared = [t for t in plan.tensors if is_compared(t, plan)]
    plain = [t for t in plan.tensors if not is_compared(t, plan)]
    run = Run(plan, inputs, journal, limits, plan.tensors)
    with one_intra_op_thread():
        state = model_state(plan, inputs)

    def merge_one(planned: TensorPlan, emit: Emit) -> Outcome:
        if planned.method == "copy":
            return copy_tensor(planned, plan, inputs, emit)
        own = state if planned.method == plan.method.name else None
        return merge_tensor(planned, plan, inputs, emit, own)

    run.stage("merge", plain, merge_one, writer)
    if compared:
        with scratch(delta_layout(compared)) as deltas:
            factors = _merge_deltas(run, compared, deltas, state)
            _scale_deltas(run, compared, factors, deltas, writer)


def run_unscaled(
    plan: Plan, inputs: Inputs, deltas: Sink, journal: Ledger, limits: Limits
) -> Mapping[str, float]:
    """Merge every tensor that is not copied into `deltas`, before α.

    `deltas` holds what `merge_unscaled` emits, laid out by `delta_layout`.

    Returns:
        Matrix -> factor of its delta besides α, for methods that compare layers; see
        `execution.factors`.
    """
    merged = merged_tensors(plan)
    run = Run(plan, inputs, journal, limits, merged)
    with one_intra_op_thread():
        state = model_state(plan, inputs)
    return _merge_deltas(run, merged, deltas, state)


def run_scaled(
    factors: Mapping[str, float],
    plan: Plan,
    inputs: Inputs,
    deltas: Sink,
    writer: Sink,
    journal: Ledger,
    limits: Limits,
) -> None:
    """Write every tensor of the plan from the deltas of `run_unscaled`: the bytes of `run_stages`.

    `plan` names the scale by now; see `with_scale`.
    """
    refuse_search(plan)
    copied = [t for t in plan.tensors if t.method == "copy"]
    run = Run(plan, inputs, journal, limits, plan.tensors)

    def copy_one(planned: TensorPlan, emit: Emit) -> Outcome:
        return copy_tensor(planned, plan, inputs, emit)

    run.stage("merge", copied, copy_one, writer)
    _scale_deltas(run, merged_tensors(plan), factors, deltas, writer)


def merged_tensors(plan: Plan) -> list[TensorPlan]:
    """Return the tensors that are not copied."""
    return [t for t in plan.tensors if t.method != "copy"]


def delta_layout(tensors: Sequence[TensorPlan]) -> OutputFile:
    """Return the layout of a scratch file of merged deltas, in the dtype of the arithmetic."""
    return OutputFile(DELTAS, tuple((t.name, t.compute, t.entry.shape) for t in tensors))


def refuse_search(plan: Plan) -> None:
    """Refuse a plan whose scale is still to be searched.

    Raises:
        RequestError: it is.
    """
    if isinstance(plan.recipe.scale, ScaleSearch):
        raise RequestError(
            f"the scale is a search ({plan.recipe.scale.search}), and this takes a number.\n"
            "Search with eutectic tune, or merge with eutectic merge or eutectic.merge."
        )


def _merge_deltas(
    run: Run, tensors: Sequence[TensorPlan], deltas: Sink, state: Any
) -> Mapping[str, float]:
    """Merge tensors before α and return the factors of those that are compared."""
    plan, inputs = run.plan, run.inputs

    def delta_one(planned: TensorPlan, emit: Emit) -> Outcome:
        own = state if planned.method == plan.method.name else None
        return merge_unscaled(planned, plan, inputs, emit, own)

    run.stage("delta", tensors, delta_one, deltas)
    compared = [t.name for t in tensors if is_compared(t, plan)]
    if plan.method.finish is None or not compared:
        return {}
    norms: dict[str, float] = {}
    for name in compared:
        norms |= run.journal.finished["delta", name].norms
    factors = layer_factors(plan.method, norms, plan.parameters)
    return {name: factors.get(name, 1.0) for name in norms}


def _scale_deltas(
    run: Run,
    tensors: Sequence[TensorPlan],
    factors: Mapping[str, float],
    deltas: Sink,
    writer: Sink,
) -> None:
    """Write W₀ + α·Δ from merged deltas."""

    def apply_one(planned: TensorPlan, emit: Emit) -> Outcome:
        for start, stop in block_ranges(planned):
            base = read_base(planned, run.inputs, start, stop)
            merged = deltas.read_back(planned.name, start, stop)
            alpha, factor = planned.scale, range_factor(planned, factors, start, stop)
            if isinstance(factor, Tensor):
                merged = merged * factor
            else:
                alpha *= factor
            emit(start, narrow(scaled(base, merged, planned, run.plan, alpha), planned, run.plan))
        done = run.journal.finished["delta", planned.name]
        return Outcome(done.norms, with_factors(done.record, planned, factors))

    run.stage("merge", tensors, apply_one, writer)


def is_compared(planned: TensorPlan, plan: Plan) -> bool:
    """Tell whether a tensor waits for the norms of the other layers."""
    return (
        plan.method.finish is not None
        and planned.decision.treatment is Treatment.MATRIX
        and not get_method(planned.method).elementwise
    )


def model_state(plan: Plan, inputs: Inputs) -> Any:
    """Run a model-scope `prepare` over every tensor of the method, or return None."""
    method, parameters = plan.method, plan.parameters
    if method.prepare is None or not method.model_scope(parameters):
        return None
    taking = [t for t in plan.tensors if t.method == method.name and t.elements]
    wide = torch.float64 if any(t.compute == torch.float64 for t in taking) else torch.float32

    def chunks() -> Iterator[Tensor]:
        for planned in taking:
            for chunk in stream_chunks(planned, method, parameters, plan, inputs):
                yield chunk.to(wide)

    return method.prepare(chunks, parameters, context_for(taking[0], plan))
