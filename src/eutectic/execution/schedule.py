"""The one schedule of a merge: deltas that wait, factors between layers, α, then the output."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.output_format import TensorSink
from eutectic.checkpoint.writer import OutputFile
from eutectic.cluster.devices import CPU
from eutectic.errors import Note, RequestError
from eutectic.execution.executors import Executor, Limits, on_threads, one_intra_op_thread
from eutectic.execution.journal import DELTAS, Ledger
from eutectic.execution.matrix_merging import context_of
from eutectic.execution.merging import (
    factors_of,
    holds_weight,
    layer_factors,
    range_factor,
    stream_chunks,
)
from eutectic.execution.ray_executor import on_ray
from eutectic.execution.tasks import Finished, Stage, Task, Workplace
from eutectic.execution.tensor_values import block_ranges, read_base
from eutectic.planning.adapter_plan import AdapterPlan
from eutectic.planning.cost import tensor_cost
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan, with_scale
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.types import Treatment


@dataclass(frozen=True)
class Unscaled:
    """A merge whose deltas are finished and whose α is still to be chosen."""

    plan: Plan  # the plan; its scale is not decided
    inputs: Inputs
    deltas: TensorSink  # scratch file of what `merge_unscaled` emitted
    factors: Mapping[str, float]  # matrix -> factor of its delta besides α; see `layer_factors`
    journal: Ledger  # the run's ledger, where a search may note what it has measured
    limits: Limits  # threads, memory, and whom to tell of progress

    def base(self, planned: TensorPlan) -> Tensor:
        """Return W₀ in the tensor's shape and the dtype of the arithmetic."""
        return read_base(planned, self.inputs, 0, planned.elements).view(planned.shape)

    def delta(self, planned: TensorPlan) -> Tensor:
        """Return Δ, so that the merged tensor is W₀ + α·Δ, in the tensor's shape."""
        flat = torch.empty(planned.elements, dtype=planned.compute)
        weights = holds_weight(planned)
        for start, stop in block_ranges(planned):
            chunk = self.deltas.read_back(planned.name, start, stop)
            if weights:
                chunk = chunk - read_base(planned, self.inputs, start, stop)
            flat[start:stop] = chunk * range_factor(planned, self.factors, start, stop)
        return flat.view(planned.shape)


@dataclass(frozen=True)
class Choice:
    """A chosen α."""

    scale: float
    note: Note  # where it comes from, for the model card
    record: dict[str, Any]  # the whole search, JSON-serialisable; `search` in `eutectic.json`


Choose = Callable[[Unscaled], Choice]
# Takes what is known before any work and raises RequestErrors; see eutectic.tuning.
Chooser = Callable[[Plan, Inputs], Choose]


def refuse_search(plan: Plan) -> None:
    """Refuse a plan whose scale is still to be searched."""
    if plan.search is not None:
        raise RequestError(
            f"the scale is a search ({plan.search.search}), and this takes a number.\n"
            "Search with eutectic tune, or merge with eutectic merge or eutectic.merge."
        )


EXECUTORS: Mapping[str, Executor] = {"threads": on_threads, "ray": on_ray}
CHOSEN = "chosen"  # stage of a search's note in the ledger

Tell = Callable[[Task], None]


@dataclass(frozen=True)
class Desk:
    """Where a merge reads, writes and notes what is done."""

    inputs: Inputs
    ledger: Ledger  # what is finished; only the schedule adds to it
    limits: Limits  # what may be used
    open_deltas: Callable[[OutputFile], AbstractContextManager[TensorSink]]  # a scratch file
    open_output: Callable[[Plan], AbstractContextManager[TensorSink | None]]  # once α is known
    parts: Path | None = None  # folder of an adapter's parts, where the output is an adapter


def run_schedule(
    plan: Plan, desk: Desk, choose: Choose | None = None
) -> tuple[Plan, Choice | None]:
    """Write every tensor of a plan; finished ones are checked by their hash and kept.

    A tensor is merged and written in one go, unless its factor waits for the norms of other layers
    or its α for a search: such a one is merged into a scratch file first, and scaled afterwards.
    Returns the plan with the α that was used, and how `choose` chose it.
    """
    late = plan.merged if choose is not None else [t for t in plan.tensors if t.compared]
    waiting = {t.name for t in late}
    tell = _meter(plan.tensors, desk)
    with ExitStack() as stack:
        output, unscaled, choice = None, None, None
        if choose is None:  # a full disk is found before any work
            refuse_search(plan)
            output = stack.enter_context(desk.open_output(plan))
        if late:
            unscaled = stack.enter_context(merged_deltas(plan, desk, late, tell))
        if choose is not None:
            assert unscaled is not None
            choice = choose(unscaled)
            desk.ledger.add(CHOSEN, "note", Finished("", vars(choice.note)))
            plan = with_scale(plan, choice.scale, choice.note)
            output = stack.enter_context(desk.open_output(plan))
        deltas = None if unscaled is None else unscaled.deltas
        place = Workplace(desk.inputs, output, deltas, desk.ledger.durable, desk.parts)
        at_once = [t for t in plan.tensors if t.name not in waiting]
        factors = {} if unscaled is None else unscaled.factors
        if plan.adapter is not None:
            _carry_out_parts(plan.adapter, (at_once, waiting), plan, desk, place, tell, factors)
            return plan, choice
        _carry_out("merge", at_once, plan, desk, place, tell)
        if unscaled is not None:
            scaled = [t for t in plan.tensors if t.name in waiting]
            _carry_out("scale", scaled, plan, desk, place, tell, factors)
    return plan, choice


def _carry_out_parts(
    adapter: AdapterPlan,
    tensors: tuple[Sequence[TensorPlan], Set[str]],
    plan: Plan,
    desk: Desk,
    place: Workplace,
    tell: Tell,
    factors: Mapping[str, float],
) -> None:
    """Write the parts of an adapter: first what it may be unable to hold, which then is refused."""
    at_once, waiting = tensors
    late = [t for t in plan.tensors if t.name in waiting]
    for doubtful in (True, False):
        for own, scales in ((at_once, {}), (late, factors)):
            chosen = [
                t
                for t in own
                if t.name in adapter.carried and adapter.is_doubtful(t.name) is doubtful
            ]
            _carry_out("part", chosen, plan, desk, place, tell, scales)
        if doubtful:
            finished = desk.ledger.finished
            records = {n: f.record for (stage, n), f in finished.items() if stage == "merge"}
            adapter.refuse_uncarried(records)


def write_scaled(plan: Plan, unscaled: Unscaled, desk: Desk) -> None:
    """Write every tensor of a plan whose α is a number, from deltas that are merged already.

    The bytes are those of `run_schedule`. `desk.ledger` takes up what is known of the deltas.
    """
    refuse_search(plan)
    waiting = {t.name for t in unscaled.plan.merged}
    for key, found in unscaled.journal.finished.items():
        if key[0] == "delta":
            desk.ledger.finished[key] = found
    tell = _meter(plan.tensors, desk)
    with desk.open_output(plan) as output:
        place = Workplace(desk.inputs, output, unscaled.deltas, desk.ledger.durable)
        at_once = [t for t in plan.tensors if t.name not in waiting]
        _carry_out("merge", at_once, plan, desk, place, tell)
        scaled = [t for t in plan.tensors if t.name in waiting]
        _carry_out("scale", scaled, plan, desk, place, tell, unscaled.factors)


@contextmanager
def merged_deltas(
    plan: Plan, desk: Desk, tensors: Sequence[TensorPlan], tell: Tell | None = None
) -> Iterator[Unscaled]:
    """Merge tensors into a scratch file, before α, and compare those that are compared."""
    layout = OutputFile(DELTAS, tuple((t.name, t.compute, t.shape) for t in tensors))
    with desk.open_deltas(layout) as deltas:
        place = Workplace(desk.inputs, None, deltas, desk.ledger.durable)
        _carry_out("delta", tensors, plan, desk, place, tell or _meter(tensors, desk))
        compared = (desk.ledger.finished["delta", t.name].norms for t in tensors if t.compared)
        norms = dict(item for own in compared for item in own.items())
        factors = layer_factors(plan.method, norms, plan.parameters) if norms else {}
        yield Unscaled(plan, desk.inputs, deltas, factors, desk.ledger, desk.limits)


def _carry_out(
    stage: Stage,
    tensors: Sequence[TensorPlan],
    plan: Plan,
    desk: Desk,
    place: Workplace,
    tell: Tell,
    factors: Mapping[str, float] | None = None,
) -> None:
    """Make one task of each tensor, let the executor do them, and note what is finished."""
    noted = "delta" if stage == "delta" else "merge"
    finished, limits = desk.ledger.finished, desk.limits
    carried = {} if plan.adapter is None else plan.adapter.carried
    merged = stage in ("scale", "part")  # maybe before
    state = None if stage == "scale" else _model_state(plan, tensors, desk.inputs)
    tasks: list[Task] = []
    for planned in tensors:
        cost = tensor_cost(planned, desk.inputs)
        late = finished.get(("delta", planned.name)) if merged and place.deltas else None
        tasks.append(
            Task(
                planned,
                stage,
                cost.peak_bytes,
                cost.seconds,
                device=CPU if late else _device_of(planned, cost.peak_bytes, limits),
                state=state if planned.method == plan.method.name else None,
                factors=factors_of(planned, factors or {}),
                delta=late,
                before=finished.get((noted, planned.name)),
                carried=carried.get(planned.name) if stage == "part" else None,
            )
        )
    with closing(EXECUTORS[limits.executor](tasks, place, limits)) as results:
        for task, found in results:
            if found != task.before:
                desk.ledger.add(noted, task.tensor.name, found)
            tell(task)


def _device_of(planned: TensorPlan, peak: int, limits: Limits) -> str:
    """Return where a tensor is merged: only methods on matrices gain by another place than the CPU.

    One that is too large for the device stays on the CPU.
    """
    room = limits.device.memory
    matrices = planned.merged and not planned.in_chunks and planned.treatment is Treatment.MATRIX
    return limits.device.name if matrices and room is not None and peak <= room else CPU


def _meter(tensors: Sequence[TensorPlan], desk: Desk) -> Tell:
    """Return what counts the seconds of finished tasks and tells how far the run is."""
    total = max(sum(tensor_cost(t, desk.inputs).seconds for t in tensors), 1e-9)
    done = 0.0

    def tell(task: Task) -> None:
        nonlocal done
        done = min(total, done + task.seconds)
        if desk.limits.progress is not None:
            desk.limits.progress(done, total, task.tensor.name)

    return tell


def _model_state(plan: Plan, tensors: Sequence[TensorPlan], inputs: Inputs) -> Any:
    """Run a model-scope `prepare` over every tensor of the method, or return None."""
    method, parameters = plan.method, plan.parameters
    if method.prepare is None or not method.model_scope(parameters):
        return None
    if method.name not in {t.method for t in tensors}:
        return None
    taking = [t for t in plan.tensors if t.method == method.name and t.elements]
    taking = [replace(t, post=None) for t in taking]  # the method's own inputs, as it reads them
    wide = torch.float64 if any(t.compute == torch.float64 for t in taking) else torch.float32

    def chunks() -> Iterator[Tensor]:
        for planned in taking:
            for chunk in stream_chunks(planned, inputs):
                yield chunk.to(wide)

    with one_intra_op_thread():
        return method.prepare(chunks, parameters, context_of(taking[0]))
