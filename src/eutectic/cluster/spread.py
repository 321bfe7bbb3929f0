"""Calls spread over the workers of a cluster, done again where a worker or a machine is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from eutectic.cluster.connection import Cluster, import_ray, size_of_cluster
from eutectic.cluster.devices import DeviceFullError
from eutectic.cluster.gpus import ALL_VISIBLE
from eutectic.cluster.workers import Answer, answer, versions
from eutectic.errors import EutecticError, RequestError

ATTEMPTS = 4  # of one call, until losing its worker counts as the call's own doing
_TICK = 0.2  # seconds between looks at an interrupt
_LOOK = 5.0  # seconds between looks at the machines while nothing is finished
_STEP = 100_000_000  # bytes: calls that ask for the same follow one another without a new request
_NOBODY = 60.0  # seconds without a machine that is large enough, until that is an error


@dataclass(frozen=True)
class Call:
    """A unit of work: `function(payload)` on any worker, both picklable.

    Attributes:
        name: what it is, for people.
        function: a function of a module that every worker can import.
        payload: its argument.
        memory: bytes that it takes together with its process.
        seconds: about how long it takes; longer ones begin first.
        gpus: share of a GPU; the function computes on `gpus.given_gpu()`.
    """

    name: str
    function: Callable[[Any], Any]
    payload: Any
    memory: int
    seconds: float = 0.0
    gpus: float = 0.0


@dataclass(frozen=True)
class Bounds:
    """How much is done at the same time."""

    calls: int  # side by side
    memory: int  # bytes of all calls side by side; one that needs more runs alone


@dataclass
class _Attempt:
    """A call that is being tried."""

    call: Call
    number: int = 1
    lost: tuple[str, ...] = ()  # why earlier attempts came to nothing


def spread(
    calls: Sequence[Call], bounds: Bounds, lost: Callable[[Call, str], None] | None = None
) -> Generator[tuple[Call, Answer], None, None]:
    """Yield every call with its answer as soon as it is there; the first error is raised.

    A call whose worker or machine is lost is done again, up to `ATTEMPTS` times; `lost` is told.
    One that ran out of memory gets twice the room next time, as far as a machine has it; so does
    one that ran out of that of its GPU. When the
    generator is closed, or the user interrupts, what is still running is ended.

    Raises:
        RequestError: a call needs more memory than any machine has.
        EutecticError: a call was lost too often, or no machine is left for it.
    """
    ray = import_ray()
    _check_size(calls)
    # Ray would end a process after each call that has a GPU.
    remote = ray.remote(max_retries=0, max_calls=0)(_on_worker)
    waiting = [
        _Attempt(call) for call in sorted(calls, key=lambda call: (-call.seconds, call.name))
    ]
    running: dict[Any, _Attempt] = {}
    expected, looked = versions(), _Look()
    size = size_of_cluster()
    # Where the whole cluster may be used, Ray itself sees to it that calls fit; some wait there, so
    # that a worker need not wait for this process.
    all_of_it = bounds.calls >= size.cpus and bounds.memory >= size.memory
    most = 2 * size.cpus if all_of_it else bounds.calls

    def next_ones() -> Iterator[_Attempt]:
        """Yield what may begin, longer ones first."""
        room = bounds.memory - sum(attempt.call.memory for attempt in running.values())
        # Calls that wait for a GPU shall not keep others from the cores.
        gpus = 2 * size.gpus - sum(attempt.call.gpus for attempt in running.values())
        for attempt in list(waiting):
            if len(running) >= most:
                return
            if attempt.call.gpus > max(gpus, 0.0):
                continue
            if all_of_it or not running or attempt.call.memory <= room:
                room -= attempt.call.memory
                gpus -= attempt.call.gpus
                waiting.remove(attempt)
                yield attempt

    try:
        while waiting or running:
            for attempt in next_ones():
                call = attempt.call
                memory = min(-(-call.memory // _STEP) * _STEP, _largest(size, call))
                own: dict[str, Any] = {"num_cpus": 1, "memory": memory, "num_gpus": call.gpus}
                if call.gpus:
                    own["runtime_env"] = ALL_VISIBLE
                reference = remote.options(**own, name=call.name[:80]).remote(
                    call.function, call.payload, expected
                )
                running[reference] = attempt
            done, _ = ray.wait(list(running), timeout=_TICK)
            if not done:
                looked.check(attempt.call for attempt in running.values())
                continue
            looked = _Look()
            more, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
            for reference in dict.fromkeys([*done, *more]):
                attempt = running.pop(reference)
                found, why = _fetched(ray, reference)
                if found is not None and not why:
                    if found.kind is not None:
                        raise found.error()
                    yield attempt.call, found
                    continue
                waiting.insert(0, _again(attempt, found, why))
                if lost is not None:
                    lost(attempt.call, why)
    finally:
        _end(ray, list(running))


def _on_worker(function: Callable[[Any], Any], payload: Any, expected: dict[str, str]) -> Answer:
    import ray

    return answer(function, payload, expected, ray.util.get_node_ip_address())


def _fetched(ray: Any, reference: Any) -> tuple[Answer | None, str]:
    """Return the answer of a call; or None, and why there is none."""
    errors = ray.exceptions
    try:
        found = ray.get(reference)
    except errors.OutOfMemoryError:
        return None, "memory"
    except (errors.NodeDiedError, errors.LocalRayletDiedError):
        return None, "its machine was lost"
    except errors.WorkerCrashedError:
        return None, "its process died"
    except (errors.ObjectLostError, errors.TaskCancelledError):
        return None, "its result was lost"
    except errors.RayTaskError as error:
        raise RequestError(
            f"a worker of the cluster cannot do what it is asked: {_cause(error)}\n"
            "Install eutectic, in the same version as here, on every machine of the cluster."
        ) from error
    except errors.RayError as error:
        return None, f"Ray reports {type(error).__name__}"
    if found.kind is not None and issubclass(found.kind, DeviceFullError):
        return found, "memory of its GPU"
    return found, "memory" if found.out_of_memory else ""


def _cause(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[-1] if lines else ''}"


def _again(attempt: _Attempt, found: Answer | None, why: str) -> _Attempt:
    """Return the next attempt of a call whose worker was lost; raise when it was the last."""
    call = attempt.call
    memory = why == "memory"
    full = why == "memory of its GPU"
    reasons = (*attempt.lost, f"it ran out of {why}" if memory or full else why)
    if attempt.number >= ATTEMPTS:
        often = ", ".join(dict.fromkeys(reasons))
        text = f"\n{found.text}" if found is not None else ""
        helps = (
            f"It asked for {_size(call.memory)}. Give the cluster machines with more memory."
            if memory
            else f"It asked for {call.gpus:.1%} of a GPU. Something else uses it, or it is small."
            if full
            else "Look into Ray's logs on that machine (/tmp/ray/session_latest/logs)."
        )
        raise EutecticError(
            f"{call.name}: given up after {attempt.number} attempts: {often}.{text}\n{helps} "
            "What is finished is kept for the same command."
        )
    if full:
        call = replace(call, gpus=min(1.0, 2 * call.gpus))
    if memory:
        largest = _largest(size_of_cluster(), call)
        call = replace(call, memory=max(call.memory, min(2 * call.memory, largest)))
    return _Attempt(call, attempt.number + 1, reasons)


def _check_size(calls: Sequence[Call]) -> None:
    """Refuse what no machine can do: Ray would wait for such a machine without an end."""
    size = size_of_cluster()
    if not calls:
        return
    if any(call.gpus for call in calls) and not size.gpus:
        raise RequestError(
            "no machine of the cluster has a GPU that Ray knows of.\n"
            "Start one with `ray start --num-gpus`, or compute on the CPU."
        )
    for call in calls:
        if call.memory > (largest := _largest(size, call)):
            kind = "machine with a GPU" if call.gpus else "machine"
            raise RequestError(
                f"{call.name} needs {_size(call.memory)}, and the largest {kind} of the cluster "
                f"gives {_size(largest)} to tasks.\nAdd a larger machine, or choose an "
                "element-wise method, which works in chunks."
            )


def _largest(size: Cluster, call: Call) -> int:
    """Return the bytes of the largest machine that can do a call."""
    return size.largest_with_gpu if call.gpus else size.largest


class _Look:
    """How long nothing has been finished, and whether anything can be."""

    def __init__(self) -> None:
        self.next = time.monotonic() + _LOOK
        self.nobody_since: float | None = None

    def check(self, calls: Any) -> None:
        """Raise EutecticError when no machine is left that the smallest call would fit on."""
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + _LOOK
        size, asked = size_of_cluster(), list(calls)
        least = min(call.memory for call in asked)
        if any(_largest(size, call) >= call.memory for call in asked):
            self.nobody_since = None
            return
        self.nobody_since = self.nobody_since or now
        if now - self.nobody_since >= _NOBODY:
            raise EutecticError(
                f"no machine with {_size(least)} for a task is left in the cluster.\n"
                "What is finished is kept: run the same command when there are machines again, or "
                "without --executor ray."
            )


def _end(ray: Any, references: list[Any]) -> None:
    """End calls that are still running, so that nobody writes any more."""
    for reference in references:
        with suppress(Exception):  # the cluster may be gone, which ends them as well
            ray.cancel(reference, force=True)
    if references:
        with suppress(Exception):
            ray.wait(references, num_returns=len(references), timeout=5)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
