"""A unit of work as data: one tensor and what shall be done to it, carried out by any worker."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eutectic.checkpoint.output_format import TensorSink
from eutectic.checkpoint.writer import unseen_output
from eutectic.cluster.devices import computing_on
from eutectic.execution.adapter_factors import hash_of_part, part_name, write_part
from eutectic.execution.merging import (
    Emit,
    Finished,
    copy_tensor,
    merge_tensor,
    merge_unscaled,
    scale_tensor,
    squares_with_factors,
    with_factors,
)
from eutectic.execution.tensor_values import flat_ranges
from eutectic.planning.adapter_plan import Carried
from eutectic.planning.inputs import InputPaths, Inputs, reopen
from eutectic.planning.tensor_plan import TensorPlan

Stage = Literal["merge", "delta", "scale", "part"]
Opening = Callable[[], AbstractContextManager[TensorSink]]


@dataclass(frozen=True)
class Task:
    """One tensor and one stage. It can be pickled, and carried out wherever the inputs are."""

    tensor: TensorPlan  # what decides its bytes
    # "merge" writes the output's tensor in one go; "delta" writes the merged delta before α to the
    # scratch file; "scale" writes the output's tensor from there; "part" writes a part of an
    # adapter, from there where it was merged before
    stage: Stage
    peak_bytes: int  # memory held while it runs
    seconds: float
    device: str = "cpu"  # where the method computes
    state: Any = None  # what `prepare` returned for the whole model, if that is the method's scope
    # of "scale" and "part": matrix -> factor of its delta besides α
    factors: Mapping[str, float] = field(default_factory=dict[str, float])
    delta: Finished | None = (
        None  # of "scale" and "part": what the "delta" task of the tensor found
    )
    before: Finished | None = None  # what an earlier run noted; kept if the bytes are still those
    carried: Carried | None = None  # of "part": how an adapter holds the tensor

    @property
    def name(self) -> str:
        """The tensor's."""
        return self.tensor.name


@dataclass(frozen=True)
class Site:
    """Where the files of a run lie: enough for a worker elsewhere to open them."""

    inputs: InputPaths
    output: Opening | None  # opens the files of the model; None before α is known
    deltas: Opening | None  # opens the file of the merged deltas; None without any
    parts: Path | None = None  # folder of an adapter's parts


@dataclass(frozen=True)
class Workplace:
    """What a worker has open."""

    inputs: Inputs
    output: TensorSink | None = None
    deltas: TensorSink | None = None  # of the merged deltas before α
    hashed: bool = True  # finished bytes are hashed, since they outlive the process
    parts: Path | None = None  # folder of an adapter's parts

    @property
    def site(self) -> Site | None:
        """How to open the same elsewhere; None in memory."""
        if self.inputs.paths is None:
            return None
        return Site(
            self.inputs.paths.absolute(),
            None if self.output is None else self.output.reopening,
            None if self.deltas is None else self.deltas.reopening,
            None if self.parts is None else self.parts.absolute(),
        )


@contextmanager
def open_site(site: Site) -> Iterator[Workplace]:
    """Open the files of a run that were laid out before, in this process or another."""
    if site.parts is not None and not site.parts.parent.is_dir():
        raise unseen_output(site.parts.parent)
    with ExitStack() as stack:
        inputs = stack.enter_context(reopen(site.inputs))
        output, deltas = (
            None if opening is None else stack.enter_context(opening())
            for opening in (site.output, site.deltas)
        )
        yield Workplace(inputs, output, deltas, parts=site.parts)


def carry_out(task: Task, place: Workplace, check: Callable[[], None] = lambda: None) -> Finished:
    """Do a task and return what is to be noted of it. It computes with one intra-op thread.

    `check`, called before every write, raises where the run is being stopped.
    """
    torch.set_num_threads(1)  # for good: giving it back would reach into tasks beside this one
    if task.stage == "part":
        with computing_on(task.device):
            return _write_part(task, place, check)
    planned, sink = task.tensor, place.deltas if task.stage == "delta" else place.output
    assert sink is not None
    if task.before is not None and stored_hash(task, place) == task.before.sha256:
        return task.before
    digest = hashlib.sha256()

    def emit(start: int, values: Tensor) -> None:
        check()
        stored = sink.write(planned.name, start, values)
        if place.hashed:
            digest.update(_bytes_of(stored))

    with computing_on(task.device):
        found = _run(task, place, emit)
    return replace(found, sha256=digest.hexdigest())


def _run(task: Task, place: Workplace, emit: Emit) -> Finished:
    planned, inputs = task.tensor, replace(place.inputs, device=task.device)
    if task.stage == "delta":
        return merge_unscaled(planned, inputs, emit, task.state)
    if task.stage == "merge":
        if not planned.merged:
            return copy_tensor(planned, inputs, emit)
        return merge_tensor(planned, inputs, emit, task.state)
    deltas, before = place.deltas, task.delta
    assert deltas is not None
    assert before is not None

    scale_tensor(planned, inputs, emit, partial(deltas.read_back, planned.name), task.factors)
    return replace(
        before,
        record=with_factors(before.record, planned, task.factors),
        squares=squares_with_factors(before.squares, planned, task.factors),
    )


def _write_part(task: Task, place: Workplace, check: Callable[[], None]) -> Finished:
    folder, planned, carried = place.parts, task.tensor, task.carried
    assert folder is not None
    assert carried is not None
    if task.before is not None:
        kept = stored_hash(task, place)
        if kept and kept == task.before.sha256:
            return task.before
    check()
    inputs, late = replace(place.inputs, device=task.device), None
    if task.delta is not None:
        assert place.deltas is not None
        late = (partial(place.deltas.read_back, planned.name), task.factors, task.delta)
    return write_part(planned, carried, inputs, folder, task.state, late)


def _bytes_of(values: Tensor) -> memoryview:
    return values.view(torch.uint8).numpy().data


def stored_hash(task: Task, place: Workplace) -> str:
    """Return the hash of what is stored of a finished task; empty where there is nothing."""
    if task.stage == "part":
        assert place.parts is not None
        return hash_of_part(place.parts / part_name(task.name))
    sink = place.deltas if task.stage == "delta" else place.output
    assert sink is not None
    return _hash_of(sink, task.tensor)


def _hash_of(sink: TensorSink, planned: TensorPlan) -> str:
    digest = hashlib.sha256()
    for start, stop in flat_ranges(planned.elements):
        digest.update(_bytes_of(sink.read_back(planned.name, start, stop)))
    return digest.hexdigest()
