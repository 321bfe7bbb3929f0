"""Jobs on the threads of one machine, under a memory limit."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from eutectic.errors import EutecticError


@dataclass(frozen=True)
class Job:
    """One unit of work.

    Attributes:
        name: the tensor.
        peak_bytes: memory held while it runs.
        seconds: estimated time; the longest start first.
        run: does it; called with a function that raises when the run is being stopped.
    """

    name: str
    peak_bytes: int
    seconds: float
    run: Callable[[Callable[[], None]], None]


class _Stopped(Exception):
    """Another job failed, or the user interrupted."""


def run_jobs(
    jobs: Sequence[Job],
    *,
    threads: int,
    memory: int,
    done: Callable[[Job], None] = lambda job: None,
) -> None:
    """Run every job, several side by side while their peaks together stay under `memory`.

    Each job computes with one intra-op thread, so the result does not depend on how many run.
    A job larger than the limit runs alone. The first error stops the others and is raised.

    Args:
        jobs: in any order; longer ones are started first.
        threads: most jobs at a time.
        memory: limit in bytes on the sum of the running jobs' peaks.
        done: called after each job, under a lock.
    """
    waiting = sorted(jobs, key=lambda job: (-job.seconds, job.name))
    state = threading.Condition()
    held = 0
    failures: list[BaseException] = []

    def check() -> None:
        if failures:
            raise _Stopped

    def take() -> Job | None:
        nonlocal held
        with state:
            while waiting and not failures:
                for position, job in enumerate(waiting):
                    if held == 0 or held + job.peak_bytes <= memory:
                        held += job.peak_bytes
                        return waiting.pop(position)
                state.wait()
            return None

    def work() -> None:
        nonlocal held
        torch.set_num_threads(1)
        while (job := take()) is not None:
            try:
                job.run(check)
                with state:
                    done(job)
            except _Stopped:
                return
            except BaseException as error:
                with state:
                    failures.append(_named(error, job))
                    state.notify_all()
                return
            finally:
                with state:
                    held -= job.peak_bytes
                    state.notify_all()

    with one_intra_op_thread():
        workers = [threading.Thread(target=work, daemon=True) for _ in range(max(1, threads))]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                while worker.is_alive():
                    worker.join(timeout=0.2)
        except BaseException as error:
            with state:
                failures.append(error)
                state.notify_all()
            for worker in workers:
                worker.join()
            raise
    if failures:
        raise failures[0]


def _named(error: BaseException, job: Job) -> BaseException:
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
