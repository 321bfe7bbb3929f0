"""The executor of one machine: tasks on threads, under a memory limit."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

import torch

from eutectic.errors import EutecticError
from eutectic.execution.executors import Limits
from eutectic.execution.tasks import Finished, Task, Workplace, carry_out


class _Job(Protocol):
    """What is known of a unit of work beforehand: its name, bytes held, and estimated seconds."""

    @property
    def name(self) -> str: ...
    @property
    def peak_bytes(self) -> int: ...
    @property
    def seconds(self) -> float: ...


AnyJob = TypeVar("AnyJob", bound=_Job)
Result = TypeVar("Result")
Check = Callable[[], None]  # raises where the run is being stopped


class _Stopped(Exception):
    """Another job failed, or the user interrupted."""


def on_threads(
    tasks: Sequence[Task], place: Workplace, limits: Limits
) -> Generator[tuple[Task, Finished], None, None]:
    """Carry out tasks on threads of this process; see `executors.Executor`."""

    def work(task: Task, check: Check) -> tuple[Task, Finished]:
        return task, carry_out(task, place, check)

    return run_jobs(tasks, work, threads=limits.threads, memory=limits.job_memory)


def run_jobs(
    jobs: Sequence[AnyJob], work: Callable[[AnyJob, Check], Result], *, threads: int, memory: int
) -> Generator[Result, None, None]:
    """Do every job, several side by side while their peaks together stay under `memory`.

    Each computes with one intra-op thread, so the result does not depend on how many run. Longer
    ones start first; one larger than the limit runs alone. The first error stops the others and is
    raised. Yields results as they come.
    """
    waiting = sorted(jobs, key=lambda job: (-job.seconds, job.name))
    state = threading.Condition()
    results: SimpleQueue[tuple[Result] | None] = SimpleQueue()
    held = 0
    failures: list[BaseException] = []

    def check() -> None:
        if failures:
            raise _Stopped

    def take() -> AnyJob | None:
        nonlocal held
        with state:
            while waiting and not failures:
                for position, job in enumerate(waiting):
                    if held == 0 or held + job.peak_bytes <= memory:
                        held += job.peak_bytes
                        return waiting.pop(position)
                state.wait()
            return None

    def fail(error: BaseException) -> None:
        with state:
            failures.append(error)
            state.notify_all()

    def do_jobs() -> None:
        nonlocal held
        while (job := take()) is not None:
            try:
                results.put((work(job, check),))
            except _Stopped:
                pass
            except BaseException as error:
                fail(_named(error, job))
            finally:
                with state:
                    held -= job.peak_bytes
                    state.notify_all()
        results.put(None)

    count = max(1, threads)
    with one_intra_op_thread():
        workers = [threading.Thread(target=do_jobs, daemon=True) for _ in range(count)]
        for worker in workers:
            worker.start()
        try:
            while count:
                try:  # a wait without an end could not be interrupted everywhere
                    result = results.get(timeout=0.2)
                except Empty:
                    continue
                if result is None:
                    count -= 1
                else:
                    yield result[0]
        except BaseException as error:  # the caller's, an interrupt, or the generator is closed
            fail(error)
            raise
        finally:
            for worker in workers:
                worker.join()
    if failures:
        raise failures[0]


def _named(error: BaseException, job: _Job) -> BaseException:
    """Say which tensor failed, unless the message does already."""
    if isinstance(error, EutecticError):
        if job.name not in str(error):
            error.args = (f"{job.name}: {error}",)
    elif sys.version_info >= (3, 11):
        error.add_note(f"while merging {job.name}")
    return error


@contextmanager
def one_intra_op_thread() -> Iterator[None]:
    """Compute with one thread inside the block, so that rounding depends on nothing else."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
