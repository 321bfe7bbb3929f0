"""Who carries out tasks, and with how much of a machine; the driver alone keeps the journal."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from eutectic.errors import RequestError
from eutectic.execution.tasks import Finished, Task, Workplace
from eutectic.planning.cost import PROCESS_BYTES
from eutectic.recipes.units import parse_bytes
from eutectic.storage.machine import default_memory, default_threads

Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Limits:
    """What a run may use.

    Attributes:
        threads: tasks side by side.
        memory: bytes of the whole process.
        progress: called with (seconds done, seconds in all, tensor), both estimates.
        device: where methods compute.
        executor: who carries out the tasks; see `executors`.
    """

    threads: int
    memory: int
    progress: Progress | None = None
    device: Literal["cpu"] = "cpu"
    executor: Literal["threads"] = "threads"

    @property
    def job_memory(self) -> int:
        """What is left for tasks beside the process itself."""
        return self.memory - PROCESS_BYTES


def limits_of(
    threads: int | None = None,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> Limits:
    """Return what to use where a caller says nothing: the cores, and 60 % of the free memory.

    Raises:
        RequestError: either is not positive, or the memory is not a size.
    """
    count = default_threads() if threads is None else threads
    size = default_memory() if memory is None else parse_bytes(memory)
    if count < 1 or size < 1:
        raise RequestError(f"threads and memory must be positive, got {threads} and {memory}.")
    return Limits(count, size, progress)


class Executor(Protocol):
    """Carries out tasks, in any order and anywhere: the bytes do not depend on it."""

    def __call__(
        self, tasks: Sequence[Task], place: Workplace, limits: Limits
    ) -> Generator[tuple[Task, Finished], None, None]:
        """Yield each task with what is to be noted of it, as soon as it is finished.

        The first error stops the others and is raised. A task computes with one intra-op thread,
        which the executor sets. Workers that do not share this process's memory open `place.site`.
        """
        ...
