"""One stage of a run: a job per tensor, hashed and noted in a ledger; finished ones are skipped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from eutectic.execution.compute import Emit, Outcome
from eutectic.execution.local import Job, run_jobs
from eutectic.planning.cost import PROCESS_BYTES, tensor_cost
from eutectic.planning.inputs import Inputs
from eutectic.planning.journal import Finished
from eutectic.planning.plan import Plan
from eutectic.planning.tensors import TensorPlan
from eutectic.planning.values import flat_ranges

Progress = Callable[[float, float, str], None]


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


class Run:
    """A plan being carried out: what is read, what is finished, and how far it is.

    `tensors` are those that it will go through, for the estimate of seconds done and in all.
    """

    def __init__(
        self,
        plan: Plan,
        inputs: Inputs,
        journal: Ledger,
        limits: Limits,
        tensors: Sequence[TensorPlan],
    ) -> None:
        self.plan, self.inputs, self.journal, self.limits = plan, inputs, journal, limits
        self._total = max(sum(tensor_cost(t, plan, inputs).seconds for t in tensors), 1e-9)
        self._done = 0.0

    def stage(
        self,
        name: str,
        tensors: Sequence[TensorPlan],
        run: Callable[[TensorPlan, Emit], Outcome],
        writer: Sink,
    ) -> None:
        """Run a job per tensor; finished ones are checked by their hash and skipped."""
        run_jobs(
            [self._job(name, planned, run, writer) for planned in tensors],
            threads=self.limits.threads,
            memory=self.limits.memory - PROCESS_BYTES,
            done=self._tell,
        )

    def _job(
        self,
        stage: str,
        planned: TensorPlan,
        run: Callable[[TensorPlan, Emit], Outcome],
        writer: Sink,
    ) -> Job:
        def execute(check: Callable[[], None]) -> None:
            finished = self.journal.finished.get((stage, planned.name))
            if finished is not None and _hash_of(writer, planned) == finished.sha256:
                return
            digest = hashlib.sha256()

            def emit(start: int, values: Tensor) -> None:
                check()
                values = values.contiguous()
                if self.journal.durable:
                    digest.update(_bytes_of(values))
                writer.write(planned.name, start, values)

            outcome = run(planned, emit)
            self.journal.add(
                stage,
                planned.name,
                Finished(digest.hexdigest(), outcome.record, outcome.norms),
            )

        cost = tensor_cost(planned, self.plan, self.inputs)
        return Job(planned.name, cost.peak_bytes, cost.seconds, execute)

    def _tell(self, job: Job) -> None:
        self._done = min(self._total, self._done + job.seconds)
        if self.limits.progress is not None:
            self.limits.progress(self._done, self._total, job.name)


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
