"""How much of a machine a run may use, and whom to tell of its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from eutectic.errors import RequestError
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
