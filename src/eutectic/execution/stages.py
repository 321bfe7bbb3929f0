"""The stages of a merge over opened files: every tensor once, then what compares layers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

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
from eutectic.execution.local import Job, one_intra_op_thread, run_jobs
from eutectic.execution.stacks import context_for
from eutectic.methods import get_method
from eutectic.planning.cost import tensor_cost
from eutectic.planning.inputs import Inputs
from eutectic.planning.journal import Finished
from eutectic.planning.plan import Plan
from eutectic.planning.tensors import TensorPlan
from eutectic.planning.values import block_ranges, flat_ranges, read_base
from eutectic.recipes.schema import ScaleSearch
from eutectic.types import Treatment

Progress = Callable[[float, float, str], None]
DELTAS = "deltas.safetensors"


@dataclass(frozen=True)
class Limits:
    """How much of the machine a run may use, and whom to tell of its progress."""

    threads: int
    memory: int
    progress: Progress | None = None


class Sink(Protocol):
    """Where merged values go: files, or memory."""

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write flat values of a tensor from `start` on; any order, any thread."""
        ...

    def read_back(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return flat values that were written."""
        ...


class Ledger(Protocol):
    """What is finished. `durable`: it outlives the process, so finished bytes are hashed."""

    finished: dict[tuple[str, str], Finished]
    durable: bool

    def add(self, stage: str, tensor: str, finished: Finished) -> None:
        """Note a finished job."""
        ...


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
    total = sum(tensor_cost(t, plan, inputs).seconds for t in plan.tensors)
    tally = _Tally(limits.progress, total)
    with one_intra_op_thread():
        state = model_state(plan, inputs)

    def merge_one(planned: TensorPlan, emit: Emit) -> Outcome:
        if planned.method == "copy":
            return copy_tensor(planned, plan, inputs, emit)
        own = state if planned.method == plan.method.name else None
        return merge_tensor(planned, plan, inputs, emit, own)

    _stage("merge", plain, merge_one, plan, inputs, writer, journal, limits, tally)
    if compared:
        with scratch(delta_layout(compared)) as deltas:
            factors = _delta_stage(compared, plan, inputs, deltas, journal, limits, tally, state)
            _scale_stage(compared, factors, plan, inputs, deltas, writer, journal, limits, tally)


def run_unscaled(
    plan: Plan, inputs: Inputs, deltas: Sink, journal: Ledger, limits: Limits
) -> Mapping[str, float]:
    """Merge every tensor that is not copied into `deltas`, before α.

    `deltas` holds what `merge_unscaled` emits, laid out by `delta_layout`.

    Returns:
        Tensor -> factor of its delta besides α, for methods that compare layers.
    """
    merged = merged_tensors(plan)
    total = sum(tensor_cost(t, plan, inputs).seconds for t in merged)
    with one_intra_op_thread():
        state = model_state(plan, inputs)
    tally = _Tally(limits.progress, total)
    return _delta_stage(merged, plan, inputs, deltas, journal, limits, tally, state)


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
    merged = merged_tensors(plan)
    copied = [t for t in plan.tensors if t.method == "copy"]
    total = sum(tensor_cost(t, plan, inputs).seconds for t in plan.tensors)
    tally = _Tally(limits.progress, total)

    def copy_one(planned: TensorPlan, emit: Emit) -> Outcome:
        return copy_tensor(planned, plan, inputs, emit)

    _stage("merge", copied, copy_one, plan, inputs, writer, journal, limits, tally)
    _scale_stage(merged, factors, plan, inputs, deltas, writer, journal, limits, tally)


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


def _delta_stage(
    tensors: Sequence[TensorPlan],
    plan: Plan,
    inputs: Inputs,
    deltas: Sink,
    journal: Ledger,
    limits: Limits,
    tally: _Tally,
    state: Any,
) -> Mapping[str, float]:
    """Merge tensors before α and return the factors of those that are compared."""

    def delta_one(planned: TensorPlan, emit: Emit) -> Outcome:
        own = state if planned.method == plan.method.name else None
        return merge_unscaled(planned, plan, inputs, emit, own)

    _stage("delta", tensors, delta_one, plan, inputs, deltas, journal, limits, tally)
    compared = [t.name for t in tensors if is_compared(t, plan)]
    if plan.method.finish is None or not compared:
        return {}
    norms = {name: journal.finished["delta", name].norm for name in compared}
    factors = plan.method.finish(norms, plan.parameters)
    return {name: factors.get(name, 1.0) for name in compared}


def _scale_stage(
    tensors: Sequence[TensorPlan],
    factors: Mapping[str, float],
    plan: Plan,
    inputs: Inputs,
    deltas: Sink,
    writer: Sink,
    journal: Ledger,
    limits: Limits,
    tally: _Tally,
) -> None:
    """Write W₀ + α·Δ from merged deltas."""

    def apply_one(planned: TensorPlan, emit: Emit) -> Outcome:
        alpha = planned.scale * factors.get(planned.name, 1.0)
        for start, stop in block_ranges(planned):
            base = read_base(planned, inputs, start, stop)
            merged = deltas.read_back(planned.name, start, stop)
            emit(start, narrow(scaled(base, merged, planned, plan, alpha), planned, plan))
        done = journal.finished["delta", planned.name]
        record = dict(done.record)
        if planned.name in factors:
            record["layer_factor"] = factors[planned.name]
        return Outcome(done.norm, record)

    _stage("merge", tensors, apply_one, plan, inputs, writer, journal, limits, tally)


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


class _Tally:
    """Estimated seconds done and in all, told to whoever watches."""

    def __init__(self, progress: Progress | None, total: float) -> None:
        self.progress, self.total, self.done = progress, max(total, 1e-9), 0.0

    def add(self, seconds: float, name: str) -> None:
        self.done = min(self.total, self.done + seconds)
        if self.progress is not None:
            self.progress(self.done, self.total, name)


def _stage(
    stage: str,
    tensors: Sequence[TensorPlan],
    run: Callable[[TensorPlan, Emit], Outcome],
    plan: Plan,
    inputs: Inputs,
    writer: Sink,
    journal: Ledger,
    limits: Limits,
    tally: _Tally,
) -> None:
    costs = {t.name: tensor_cost(t, plan, inputs) for t in tensors}

    def job_for(planned: TensorPlan) -> Job:
        def execute(check: Callable[[], None]) -> None:
            finished = journal.finished.get((stage, planned.name))
            if finished is not None and _hash_of(writer, planned) == finished.sha256:
                return
            digest = hashlib.sha256()

            def emit(start: int, values: Tensor) -> None:
                check()
                values = values.contiguous()
                if journal.durable:
                    digest.update(_bytes_of(values))
                writer.write(planned.name, start, values)

            outcome = run(planned, emit)
            journal.add(
                stage, planned.name, Finished(digest.hexdigest(), outcome.norm, outcome.record)
            )

        cost = costs[planned.name]
        return Job(planned.name, cost.peak_bytes, cost.seconds, execute)

    run_jobs(
        [job_for(planned) for planned in tensors],
        threads=limits.threads,
        memory=limits.memory,
        done=lambda job: tally.add(job.seconds, job.name),
    )


def _bytes_of(values: Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data


def _hash_of(writer: Sink, planned: TensorPlan) -> str:
    digest = hashlib.sha256()
    for start, stop in flat_ranges(planned.elements):
        digest.update(_bytes_of(writer.read_back(planned.name, start, stop)))
    return digest.hexdigest()


def hashes(journal: Ledger) -> Mapping[str, str]:
    """Return tensor -> hash of its bytes in the output."""
    return {
        tensor: done.sha256
        for (stage, tensor), done in sorted(journal.finished.items())
        if stage == "merge"
    }


def records_of(journal: Ledger) -> dict[str, Any]:
    """Return tensor -> what its method reported, for tensors with something to report."""
    return {
        tensor: done.record
        for (stage, tensor), done in sorted(journal.finished.items())
        if stage == "merge" and done.record
    }
