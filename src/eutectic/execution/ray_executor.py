"""Tasks carried out by the workers of a Ray cluster; an executor beside threads.

The driver alone keeps the journal. A worker opens inputs and output by their description, keeps
them open for the tasks that follow, and writes its ranges into the output's files itself.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.writer import write_atomically
from eutectic.cluster.connection import import_ray
from eutectic.cluster.devices import CPU, Device
from eutectic.cluster.gpus import given_gpu, own_share, share_of
from eutectic.cluster.spread import Bounds, Call, spread
from eutectic.cluster.workers import kept, this_machine
from eutectic.errors import OutputError, RequestError
from eutectic.execution.adapter_factors import part_name
from eutectic.execution.executors import Limits, named, on_threads
from eutectic.execution.tasks import (
    Finished,
    Task,
    Workplace,
    carry_out,
    open_site,
    stored_hash,
)
from eutectic.planning.cost import PROCESS_BYTES
from eutectic.storage import url_of

_BATCH_SECONDS = 0.25  # of estimated work in one call, which itself costs some milliseconds
_BATCH_TASKS = 64
_ROUNDS = 8  # calls per worker, at least, where there is work enough: the last ones end together


@dataclass(frozen=True)
class Batch:
    """Tasks that one call carries out, one after the other."""

    tasks: tuple[Task, ...]
    site: Any  # reference of the description of what must be open
    key: str  # under which a worker keeps that open
    driver: str  # the machine that keeps the journal; others make sure that it sees what they wrote
    device: Device | None = None  # of those that are merged on a worker's GPU


def on_ray(
    tasks: Sequence[Task], place: Workplace, limits: Limits
) -> Generator[tuple[Task, Finished], None, None]:
    """Carry out tasks on the workers of a Ray cluster; an `Executor`.

    A task asks for one core and, as the plan estimates it, its memory; one that is merged on a GPU
    for the share of it that holds as much. One whose worker, machine or
    memory is lost is carried out again elsewhere: bytes that were written twice are the same ones.
    What another machine wrote is read back here before it counts as finished.
    """
    site = place.site
    if site is None:
        raise RequestError(
            "the executor ray merges files, which every worker can open.\n"
            "State dicts in memory are merged by the executor threads."
        )
    here, alone = this_machine(), _only_here(place)
    if alone:
        site = replace(site, output=None, deltas=None, parts=None)
        tasks, kept_before = _without_finished(tasks, place)
        yield from kept_before
        late = [task for task in tasks if task.delta is not None]
        yield from on_threads(late, place, limits)  # they read what only this process has
        tasks = [task for task in tasks if task.delta is None]
    if not tasks:
        return
    reference, key = import_ray().put(site), uuid.uuid4().hex
    calls = [
        Call(
            batch[0].name if len(batch) == 1 else f"{batch[0].name} and {len(batch) - 1} more",
            carry_out_and_send if alone else carry_out_batch,
            Batch(batch, reference, key, here, device),
            (peak := max(task.peak_bytes for task in batch)) + PROCESS_BYTES,
            sum(task.seconds for task in batch),
            0.0 if device is None else share_of(device, peak),
        )
        for device in (None, limits.device)
        for batch in batches(_of_place(tasks, device), limits.threads)
    ]
    for call, answer in spread(calls, Bounds(limits.threads, limits.memory)):
        for task, value in zip(call.payload.tasks, answer.value, strict=True):
            found: Finished = _received(task, value, place) if alone else value
            if answer.machine != here and stored_hash(task, place) != found.sha256:
                raise _unseen(task, answer.node)
            yield task, found


def _only_here(place: Workplace) -> bool:
    """Tell whether the output lies where only this process writes, and sends it to a store."""
    sinks = [sink for sink in (place.output, place.deltas) if sink is not None]
    held = place.parts is not None and url_of(place.parts) is not None
    return held or any(sink.reopening is None for sink in sinks)


def _without_finished(
    tasks: Sequence[Task], place: Workplace
) -> tuple[list[Task], list[tuple[Task, Finished]]]:
    """Return the tasks without those whose bytes are there, and these as they were noted."""
    left: list[Task] = []
    finished: list[tuple[Task, Finished]] = []
    for task in tasks:
        if task.before is not None and stored_hash(task, place) == task.before.sha256:
            finished.append((task, task.before))
        else:
            left.append(replace(task, before=None))
    return left, finished


def _of_place(tasks: Sequence[Task], device: Device | None) -> list[Task]:
    """Return the tasks of the CPU, or those of a device."""
    return [task for task in tasks if (task.device != CPU) == (device is not None)]


def batches(tasks: Sequence[Task], workers: int) -> list[tuple[Task, ...]]:
    """Return the tasks, longer ones first, those that take hardly any time several in a batch."""
    total = sum(task.seconds for task in tasks)
    enough = min(_BATCH_SECONDS, total / (workers * _ROUNDS))
    found: list[tuple[Task, ...]] = []
    batch: list[Task] = []
    for task in sorted(tasks, key=lambda task: (-task.seconds, task.name)):
        batch.append(task)
        if sum(t.seconds for t in batch) >= enough or len(batch) == _BATCH_TASKS:
            found.append(tuple(batch))
            batch = []
    return [*found, tuple(batch)] if batch else found


def carry_out_batch(batch: Batch) -> list[Finished]:
    """Carry out the tasks of a batch, on a worker."""
    place = _place_of(batch)
    with _on_device(batch) as tasks:
        found = _carried_out(tasks, place)
    if this_machine() != batch.driver:
        for sink in (place.output, place.deltas):
            if sink is not None:
                sink.sync()  # else it may be in the memory of this machine alone
    return found


def _place_of(batch: Batch) -> Workplace:
    """Return what is open on this worker for a run."""

    def opened() -> tuple[Workplace, Callable[[], None]]:
        stack = ExitStack()
        place = stack.enter_context(open_site(import_ray().get(batch.site)))
        return place, stack.close

    return kept(batch.key, opened)


@contextmanager
def _on_device(batch: Batch) -> Iterator[list[Task]]:
    """Yield the tasks with the GPU that Ray has given this call, within its share of it."""
    if batch.device is None:
        yield list(batch.tasks)
        return
    name = given_gpu()
    with own_share(name, batch.device):
        yield [replace(task, device=name) for task in batch.tasks]


def _carried_out(tasks: Sequence[Task], place: Workplace) -> list[Finished]:
    found: list[Finished] = []
    for task in tasks:
        try:
            found.append(carry_out(task, place))
        except Exception as error:
            raise named(error, task) from error
    return found


@dataclass(frozen=True)
class _Sent:
    """A finished task with its bytes: flat ranges of its tensor, or the file of its part."""

    finished: Finished
    ranges: list[tuple[int, Tensor]]
    part: bytes = b""


class _Collected:
    """What tasks emit, kept for the process that writes it; the surface of `TensorSink`."""

    reopening = None

    def __init__(self) -> None:
        self.ranges: list[tuple[int, Tensor]] = []

    def write(self, name: str, start: int, values: Tensor) -> Tensor:
        del name  # of the one task
        held = values.detach().reshape(-1).contiguous().cpu()
        self.ranges.append((start, held))
        return held.view(torch.uint8)

    def read_back(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        raise AssertionError(f"{name}: what is written elsewhere is read there, {start} to {stop}")

    def sync(self) -> None:
        """Do nothing: it is sent."""


def carry_out_and_send(batch: Batch) -> list[_Sent]:
    """Carry out the tasks of a batch, on a worker that cannot write the output itself."""
    place = _place_of(batch)
    sent: list[_Sent] = []
    with tempfile.TemporaryDirectory(prefix="eutectic-parts-") as folder, _on_device(batch) as own:
        for task in own:
            sink, parts = _Collected(), Path(folder)
            here = replace(place, output=sink, deltas=sink, parts=parts)
            [finished] = _carried_out([task], here)
            file = parts / part_name(task.name)
            part = file.read_bytes() if task.stage == "part" else b""
            sent.append(_Sent(finished, sink.ranges, part))
    return sent


def _received(task: Task, sent: _Sent, place: Workplace) -> Finished:
    """Write what a worker sent."""
    if task.stage == "part":
        assert place.parts is not None
        place.parts.mkdir(parents=True, exist_ok=True)
        write_atomically(place.parts / part_name(task.name), sent.part)
        return sent.finished
    sink = place.deltas if task.stage == "delta" else place.output
    assert sink is not None
    for start, values in sent.ranges:
        sink.write(task.name, start, values)
    return sent.finished


def _unseen(task: Task, node: str) -> OutputError:
    return OutputError(
        f"{task.name}: what worker {node} wrote is not what this machine reads.\n"
        "Every machine that takes part must see the output's folder under the same path: use a "
        "shared file system. What was finished before is kept for the same command."
    )
