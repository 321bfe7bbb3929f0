"""Tasks carried out by the workers of a Ray cluster; an executor beside threads.

The driver alone keeps the journal. A worker opens inputs and output by their description, keeps
them open for the tasks that follow, and writes its ranges into the output's files itself.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from eutectic.cluster.connection import import_ray
from eutectic.cluster.spread import Bounds, Call, spread
from eutectic.cluster.workers import kept, this_machine
from eutectic.errors import OutputError, RequestError
from eutectic.execution.executors import Limits, named
from eutectic.execution.tasks import (
    Finished,
    Task,
    Workplace,
    carry_out,
    open_site,
    stored_hash,
)
from eutectic.planning.cost import PROCESS_BYTES

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


def on_ray(
    tasks: Sequence[Task], place: Workplace, limits: Limits
) -> Generator[tuple[Task, Finished], None, None]:
    """Carry out tasks on the workers of a Ray cluster; an `Executor`.

    A task asks for one core and, as the plan estimates it, its memory. One whose worker, machine or
    memory is lost is carried out again elsewhere: bytes that were written twice are the same ones.
    What another machine wrote is read back here before it counts as finished.
    """
    site = place.site
    if site is None or (place.output is not None and site.output is None):
        raise RequestError(
            "the executor ray merges files into files that every worker can open.\n"
            "State dicts in memory are merged by the executor threads."
        )
    if not tasks:
        return
    reference, key, here = import_ray().put(site), uuid.uuid4().hex, this_machine()
    calls = {
        number: Call(
            batch[0].name if len(batch) == 1 else f"{batch[0].name} and {len(batch) - 1} more",
            carry_out_batch,
            Batch(batch, reference, key, here),
            max(task.peak_bytes for task in batch) + PROCESS_BYTES,
            sum(task.seconds for task in batch),
        )
        for number, batch in enumerate(batches(tasks, limits.threads))
    }
    for call, answer in spread(list(calls.values()), Bounds(limits.threads, limits.memory)):
        for task, found in zip(call.payload.tasks, answer.value, strict=True):
            if answer.machine != here and stored_hash(task, place) != found.sha256:
                raise _unseen(task, answer.node)
            yield task, found


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

    def opened() -> tuple[Workplace, Callable[[], None]]:
        stack = ExitStack()
        place = stack.enter_context(open_site(import_ray().get(batch.site)))
        return place, stack.close

    place: Workplace = kept(batch.key, opened)
    found: list[Finished] = []
    for task in batch.tasks:
        try:
            found.append(carry_out(task, place))
        except Exception as error:
            raise named(error, task) from error
    if this_machine() != batch.driver:
        for sink in (place.output, place.deltas):
            if sink is not None:
                sink.sync()  # else it may be in the memory of this machine alone
    return found


def _unseen(task: Task, node: str) -> OutputError:
    return OutputError(
        f"{task.name}: what worker {node} wrote is not what this machine reads.\n"
        "Every machine that takes part must see the output's folder under the same path: use a "
        "shared file system. What was finished before is kept for the same command."
    )
