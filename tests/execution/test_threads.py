"""Jobs side by side under a memory limit.

Guards: every job runs once; no more memory is admitted than allowed; a failure stops the rest, is
raised as it is, and nothing hangs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eutectic.errors import CheckpointError, MissingExtraError, RecipeError
from eutectic.execution import executors


@dataclass(frozen=True)
class Job:
    name: str
    peak_bytes: int
    seconds: float
    run: Callable[[Callable[[], None]], Any]


def run_jobs(jobs: Sequence[Job], *, threads: int, memory: int) -> Generator[Any, None, None]:
    def work(job: Job, check: Callable[[], None]) -> Any:
        return job.run(check)

    return executors.run_jobs(jobs, work, threads=threads, memory=memory)


class Gauge:
    """Notes how much memory running jobs hold together."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held = self.peak = self.running = self.most = 0
        self.ran: list[str] = []

    def job(self, name: str, size: int, seconds: float = 1.0) -> Job:
        def run(check: Callable[[], None]) -> str:
            with self.lock:
                self.held += size
                self.running += 1
                self.peak, self.most = max(self.peak, self.held), max(self.most, self.running)
            try:
                threading.Event().wait(0.001)
                check()
                self.ran.append(name)
            finally:
                with self.lock:
                    self.held -= size
                    self.running -= 1
            return name

        return Job(name, size, seconds, run)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 30), min_size=0, max_size=12), st.integers(1, 4), st.integers(10, 40)
)
def test_every_job_runs_once_and_memory_is_respected(
    sizes: list[int], threads: int, memory: int
) -> None:
    gauge = Gauge()
    jobs = [gauge.job(f"j{i}", size, float(i % 3)) for i, size in enumerate(sizes)]
    told = list(run_jobs(jobs, threads=threads, memory=memory))
    assert sorted(gauge.ran) == sorted(told) == sorted(job.name for job in jobs)
    assert gauge.peak <= max([memory, *sizes])
    assert gauge.most <= threads


def test_longer_jobs_start_first() -> None:
    gauge = Gauge()
    jobs = [gauge.job("short", 1, 1.0), gauge.job("long", 1, 3.0), gauge.job("middle", 1, 2.0)]
    assert list(run_jobs(jobs, threads=1, memory=10)) == gauge.ran
    assert gauge.ran == ["long", "middle", "short"]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_stops_the_rest(threads: int) -> None:
    gauge = Gauge()

    def fail(check: Callable[[], None]) -> None:
        raise CheckpointError("the file ends early")

    jobs = [Job("bad", 1, 9.0, fail), *(gauge.job(f"j{i}", 1) for i in range(200))]
    with pytest.raises(CheckpointError, match="bad: the file ends early"):
        list(run_jobs(jobs, threads=threads, memory=2))
    assert len(gauge.ran) < 200


@pytest.mark.parametrize(
    "error",
    [RecipeError(["one", "two"]), MissingExtraError("peft", "adapters", "this"), ValueError("x")],
)
def test_errors_of_any_form_keep_their_kind_and_words(error: Exception) -> None:
    text = str(error)

    def fail(check: Callable[[], None]) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        list(run_jobs([Job("bad", 1, 1.0, fail)], threads=2, memory=1))
    assert text in str(caught.value)


def test_running_jobs_learn_that_another_failed() -> None:
    entered = threading.Event()
    stopped = threading.Event()

    def endless(check: Callable[[], None]) -> None:
        entered.set()
        try:
            while True:
                check()
                threading.Event().wait(0.001)
        finally:
            stopped.set()

    def fail(check: Callable[[], None]) -> None:
        assert entered.wait(30)
        raise CheckpointError("gone")

    with pytest.raises(CheckpointError):
        list(run_jobs([Job("a", 1, 2.0, endless), Job("b", 1, 1.0, fail)], threads=2, memory=2))
    assert stopped.is_set()


def test_an_error_of_the_caller_stops_the_rest() -> None:
    gauge = Gauge()
    jobs = [gauge.job(f"j{i}", 1) for i in range(200)]
    with pytest.raises(KeyError, match="broken bar"):
        for _ in run_jobs(jobs, threads=2, memory=2):
            raise KeyError("broken bar")
    assert len(gauge.ran) < 200
    assert gauge.running == 0


def test_jobs_that_nobody_waits_for_any_more_end() -> None:
    gauge = Gauge()
    results = run_jobs([gauge.job(f"j{i}", 1) for i in range(200)], threads=2, memory=2)
    next(results)
    results.close()
    assert len(gauge.ran) < 200
    assert gauge.running == 0


def test_jobs_compute_with_one_thread_and_the_setting_is_restored() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    torch.set_num_threads(2)
    try:
        job = Job("a", 1, 1.0, lambda check: seen.append(torch.get_num_threads()))
        list(run_jobs([job], threads=1, memory=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]
