"""Who carries out tasks, and with how much of a machine; threads are the first executor."""

import re
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

import psutil
import torch

from eutectic.cluster.devices import CPU, MPS, ON_CPU, Device, device_here, models_here
from eutectic.cluster.gpus import device_of_workers
from eutectic.cluster.where import (
    ExecutorName,
    check_where,
    default_memory,
    default_threads,
    joined,
)
from eutectic.errors import EutecticError, RequestError
from eutectic.execution.tasks import Finished, Task, Workplace, carry_out
from eutectic.planning.cost import PROCESS_BYTES
from eutectic.recipes.units import parse_bytes


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, it does not start at the parent process's peak
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if match:
            return int(match[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))  # the former on Windows


Progress = Callable[[float, float, str], None]  # seconds done and in all, estimated; tensor


@dataclass(frozen=True)
class Limits:
    """What a run may use."""

    threads: int  # tasks side by side
    memory: int  # bytes of the whole process
    progress: Progress | None = None
    device: Device = ON_CPU  # where methods on matrices compute
    models: Device = ON_CPU  # where models run, of this process
    executor: ExecutorName = "threads"  # who carries out the tasks
    machine: int | None = None  # bytes for tasks of the largest machine, where there are several

    @property
    def of_one_task(self) -> int:
        """The memory that one task can have at most, with its process."""
        return self.memory if self.machine is None else min(self.memory, self.machine)


MOST_THREADS = 1024


def limits_of(
    threads: int | None = None,
    memory: str | int | None = None,
    progress: Progress | None = None,
    *,
    executor: ExecutorName = "threads",
    ray_address: str | None = None,
    device: str = CPU,
    models: bool = False,
) -> Limits:
    """Return what to use where a caller says nothing.

    On threads, that is the cores of this process and 60 % of the free memory. With Ray, it is what
    the cluster has, which is joined or started here (see `cluster.connect`): `threads` tasks run
    side by side and together take `memory`, over all machines. `device` is that of methods on
    matrices: "cpu", "cuda", "cuda:N", or "auto" for an accelerator where there is one; what is free
    on it is all that their tasks take there together. With Ray it is the GPU that a task is given.

    `models` says that this process runs models: on the same device; with Ray on this machine's
    accelerator, if any. Only then is "mps" a device: models run there, matrices are merged on the
    CPU.
    """
    check_where(executor, ray_address)
    size = None if memory is None else parse_bytes(memory)
    if (threads is not None and threads < 1) or (size is not None and size < 1):
        raise RequestError(f"threads and memory must be positive, got {threads} and {memory}.")
    if threads is not None and threads > MOST_THREADS:
        raise RequestError(f"threads must be at most {MOST_THREADS:,}, got {threads:,}.")
    if executor == "threads":
        chosen, running = _devices(device, models)
        cores, memory = threads or default_threads(), size or default_memory()
        return Limits(cores, memory, progress, chosen, running)
    found = joined(ray_address, threads, size)
    matrices = device_of_workers(device)
    return Limits(
        threads or found.cpus,
        size or found.memory,
        progress,
        matrices,
        models_here("auto") if models and matrices.model else ON_CPU,
        executor=executor,
        machine=found.largest,
    )


def _devices(text: str, models: bool) -> tuple[Device, Device]:
    """Return where matrices are merged and where models run, in this process."""
    if models and text.strip().lower() == MPS:
        return ON_CPU, models_here(text)
    chosen = device_here(text)
    return chosen, models_here(text) if models and not chosen.model else chosen


class Executor(Protocol):
    """Carries out tasks, in any order and anywhere: the bytes do not depend on it."""

    def __call__(
        self, tasks: Sequence[Task], place: Workplace, limits: Limits
    ) -> Generator[tuple[Task, Finished], None, None]:
        """Yield each task with what is to be noted of it, as soon as it is finished.

        The first error stops the others and is raised. Workers that do not share this process's
        memory open `place.site`.
        """
        ...


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
    """Carry out tasks on threads of this process; an `Executor`."""

    def work(task: Task, check: Check) -> tuple[Task, Finished]:
        return task, carry_out(task, place, check)

    memory = limits.memory - PROCESS_BYTES
    held = {task.name: 0 if task.device == CPU else task.peak_bytes for task in tasks}
    room = limits.device.memory
    there = None if room is None else Room(held, room)
    return run_jobs(tasks, work, threads=limits.threads, memory=memory, beside=there)


@dataclass(frozen=True)
class Room:
    """A second limit for jobs side by side: what each holds by name, and how much there is."""

    held: Mapping[str, int]
    size: int


def run_jobs(
    jobs: Sequence[AnyJob],
    work: Callable[[AnyJob, Check], Result],
    *,
    threads: int,
    memory: int,
    beside: Room | None = None,
) -> Generator[Result, None, None]:
    """Do every job, several side by side while their peaks together stay under `memory`.

    The same holds for what they take of the room `beside`. Longer ones start first; one larger than
    the limit runs alone. The first error stops the others.
    """
    waiting = sorted(jobs, key=lambda job: (-job.seconds, job.name))
    state = threading.Condition()
    results: SimpleQueue[tuple[Result] | None] = SimpleQueue()
    held = there = 0
    room = beside or Room({}, 0)
    failures: list[BaseException] = []

    def check() -> None:
        if failures:
            raise _Stopped

    def take() -> AnyJob | None:
        nonlocal held, there
        with state:
            while waiting and not failures:
                for position, job in enumerate(waiting):
                    own = room.held.get(job.name, 0)
                    fits = there == 0 or there + own <= room.size
                    if held == 0 or (held + job.peak_bytes <= memory and fits):
                        held += job.peak_bytes
                        there += own
                        return waiting.pop(position)
                state.wait()
            return None

    def fail(error: BaseException) -> None:
        with state:
            failures.append(error)
            state.notify_all()

    def do_jobs() -> None:
        nonlocal held, there
        while (job := take()) is not None:
            try:
                results.put((work(job, check),))
            except _Stopped:
                pass
            except BaseException as error:
                fail(named(error, job))
            finally:
                with state:
                    held -= job.peak_bytes
                    there -= room.held.get(job.name, 0)
                    state.notify_all()
        results.put(None)

    count = threads
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


def named(error: BaseException, job: _Job) -> BaseException:
    """Return an error that says which tensor failed, unless its message does already."""
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
