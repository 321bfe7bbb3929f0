"""One pass over the data by several workers of a cluster, whose sums are added in a fixed order.

Batch i goes to worker i mod N. A worker that is lost costs what it had added since the state was
saved: the data are gone through again for it alone.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from eutectic.cluster.connection import Cluster
from eutectic.cluster.crew import Crew, LostMember
from eutectic.cluster.devices import ON_CPU, Device, running_on
from eutectic.cluster.gpus import given_gpu, own_share
from eutectic.errors import EutecticError
from eutectic.models.batches import Batch
from eutectic.statistics.collection_plan import make_plan
from eutectic.statistics.data_pass import AddBatch, Pass, adding, numbered_batches
from eutectic.statistics.recorder import PassSums
from eutectic.statistics.settings import Settings
from eutectic.statistics.unfinished_collection import DataLog

_LOSSES = 4  # of workers in one pass, until that counts as the collection's own doing
_AHEAD = 2  # batches that wait at a worker
_PROCESS_BYTES = 800_000_000  # interpreter, torch, transformers
_SHARD = re.compile(r"shard-(\d+)/(.*)", re.DOTALL)

OpenModel = Callable[[], nn.Module]
Saved = tuple[int, Mapping[str, Tensor]]  # batches done, and the state of the sums


@dataclass(frozen=True)
class Sharing:
    """How the data of a collection are divided."""

    cluster: Cluster
    shards: int
    open_model: OpenModel | None = None  # on a worker; None: the model is sent there
    device: Device = ON_CPU  # of the workers: the CPU, or the GPU that each is given


@dataclass(frozen=True)
class _Work:
    """What a worker must know; all of it can be pickled."""

    model: nn.Module | OpenModel
    first: Batch
    settings: Settings
    part: int
    device: Device = ON_CPU


class _Adder:
    """A worker's sums and the model that it runs."""

    def __init__(self, work: _Work) -> None:
        model = work.model if isinstance(work.model, nn.Module) else work.model()
        self._open = ExitStack()
        if work.device.model:
            name = given_gpu()
            self._open.enter_context(own_share(name, work.device))
            model = model.to(name)
        self._device = work.device.name
        plan = make_plan(model, work.first, work.settings).parts(work.settings)[work.part]
        sums = PassSums(plan, work.settings)
        self._job = Pass(model, (), plan, work.settings, sums, DataLog(), 0, lambda _: None)
        self._add: AddBatch = self._open.enter_context(adding(self._job))

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._job.sums.load(state)

    def add(self, index: int, batch: Batch, hashes: list[int]) -> None:
        with running_on(self._device):
            self._add(index, batch, hashes)

    def state(self) -> dict[str, Tensor]:
        # Whoever reads them may have no GPU.
        return {name: tensor.cpu() for name, tensor in self._job.sums.state().items()}


def states_of(saved: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the states in a saved one: one of each worker, or that of a single process."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in saved.items():
        match = _SHARD.fullmatch(key)
        if match is None:
            return [dict(saved)]
        found.setdefault(int(match[1]), {})[match[2]] = tensor
    return [found[number] for number in sorted(found)]


def load_joined(sums: PassSums, saved: Mapping[str, Tensor]) -> None:
    """Go on with the sum of all that was saved, in one process."""
    first, *others = states_of(saved)
    sums.load(first)
    for state in others:
        sums.join(state)


class ShardedPass:
    """A pass whose batches are divided; `saved` returns what was kept of it, None if nothing was.

    `state` may be asked between two batches, and is that after all that were given out.
    """

    def __init__(
        self,
        job: Pass,
        part: int,
        first: Batch,
        sharing: Sharing,
        saved: Callable[[], Saved | None],
    ) -> None:
        self._job, self._saved = job, saved
        opened = sharing.open_model or job.model
        work = _Work(opened, first, job.settings, part, sharing.device)
        # One worker a GPU: a second would be no faster, and would hold the model once more.
        gpus = 1.0 if sharing.device.model else 0.0
        memory = _PROCESS_BYTES + _bytes_of_model(job.model) + _bytes_of_sums(job.sums)
        self._crew = Crew(_Adder, work, sharing.shards, memory, sharing.cluster, gpus)
        self._waiting: list[deque[Any]] = [deque() for _ in range(sharing.shards)]
        self._given = [job.start] * sharing.shards  # batches before it are in a worker's sums
        self._before: list[dict[str, Tensor]] = []  # of a run with another number of workers

    def run(self) -> None:
        """Add up the whole data; the sums are in the job's own at the end."""
        losses, begun = 0, False
        furthest = self._job.start
        try:
            while True:
                try:
                    if not begun:
                        self._load_all()
                        begun = True
                    for index, batch, hashes in numbered_batches(self._job):
                        self._give(index, batch, hashes)
                        if index + 1 > furthest:
                            furthest = index + 1
                            self._job.after_batch(furthest)
                    states = self._states()
                    break
                except LostMember as lost:
                    losses += 1
                    if losses > _LOSSES:
                        raise EutecticError(
                            f"workers of the cluster were lost {losses} times ({lost.why}).\n"
                            "Give them more memory, or ask for fewer shards. What was saved is "
                            "kept for the same command."
                        ) from None
                    self._take_up(lost.number)
            for state in (*self._before, *states):
                self._job.sums.join(state)
        finally:
            self._crew.dismiss()

    def state(self) -> dict[str, Tensor]:
        """Return the states of all workers under their numbers."""
        states = [*self._before, *self._states()]
        return {
            f"shard-{n:04}/{key}": t for n, state in enumerate(states) for key, t in state.items()
        }

    def _give(self, index: int, batch: Batch, hashes: list[int]) -> None:
        number = index % len(self._crew)
        if index < self._given[number]:
            return
        waiting = self._waiting[number]
        if len(waiting) >= _AHEAD:
            self._crew.wait_for(number, waiting.popleft())
        waiting.append(self._crew.ask(number, "add", index, batch, hashes))
        self._given[number] = index + 1

    def _states(self) -> list[dict[str, Tensor]]:
        for number, waiting in enumerate(self._waiting):
            while waiting:
                self._crew.wait_for(number, waiting.popleft())
        asked = [self._crew.ask(number, "state") for number in range(len(self._crew))]
        return [self._crew.wait_for(number, one) for number, one in enumerate(asked)]

    def _load_all(self) -> None:
        saved = self._saved()
        states = [] if saved is None else states_of(saved[1])
        if len(states) != len(self._crew):
            self._before, states = states, []  # they are added at the end
        for number, state in enumerate(states):
            self._waiting[number].append(self._crew.ask(number, "load", state))

    def _take_up(self, number: int) -> None:
        """Let a new worker go on where the lost one was saved."""
        self._crew.replace(number)
        self._waiting[number].clear()
        self._given[number] = self._job.start
        saved = self._saved()
        states = [] if saved is None else states_of(saved[1])[len(self._before) :]
        if saved is not None and len(states) == len(self._crew):
            self._given[number] = saved[0]
            self._waiting[number].append(self._crew.ask(number, "load", states[number]))


def _bytes_of_model(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _bytes_of_sums(sums: PassSums) -> int:
    grams = sum(gram.most_bytes for gram in sums.grams.values())
    return 2 * grams + sum(8 * total.numel() for total in sums.totals.values())
