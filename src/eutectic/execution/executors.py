"""Who carries out tasks. An executor is one function; the driver alone keeps the journal."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Protocol

from eutectic.execution.limits import Limits
from eutectic.execution.tasks import Finished, Task, Workplace
from eutectic.execution.threads import on_threads


class Executor(Protocol):
    """Carries out tasks, in any order and anywhere: the bytes do not depend on it."""

    def __call__(
        self, tasks: Sequence[Task], place: Workplace, limits: Limits
    ) -> Generator[tuple[Task, Finished], None, None]:
        """Yield each task with what is to be noted of it, as soon as it is finished.

        The first error stops the others and is raised. An executor whose workers do not share this
        process's memory lets them open `place.site`.
        """
        ...


EXECUTORS: Mapping[str, Executor] = {"threads": on_threads}
