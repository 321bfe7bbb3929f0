"""Calls that workers of a cluster import: they fail, die and dawdle as a test asks them to."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from eutectic.cluster import gpus, workers
from eutectic.cluster.devices import DeviceFullError
from eutectic.errors import NumericalError, RecipeError
from eutectic.execution import ray_executor, tasks
from helpers.pretended_device import DEVICE, pretended


def double(number: int) -> int:
    return 2 * number


def die_once(marker: str) -> str:
    """End this process as the system does when memory is short; the second time, live."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def die(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def need_memory(marker: str) -> int:
    """Refuse to work until it is the second try; return what the task asks for then."""
    if not Path(marker).exists():
        Path(marker).touch()
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB")
    import ray

    return int(ray.get_runtime_context().get_assigned_resources()["memory"])


def never_enough(_: object) -> None:
    raise MemoryError


def fail(kind: str) -> None:
    if kind == "recipe":
        raise RecipeError(["one", "two"])
    if kind == "number":
        raise NumericalError("layer.3: NaN in expert 'a'\nRepair it.")
    raise ZeroDivisionError("of nobody's purpose")


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def lose_machine_once(marker: str, spared: str, batch: ray_executor.Batch) -> Any:
    """End the node that this runs on, unless it is the spared one; that waits for it to happen."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    if own != spared and not Path(marker).exists():
        Path(marker).write_text(own)
        os.kill(os.getppid(), signal.SIGKILL)  # the raylet: the node
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(600):
        if Path(marker).exists():
            break
        time.sleep(0.1)
    return ray_executor.carry_out_batch(batch)


def pretended_gpus(_: object) -> list[gpus.Gpu]:
    return [gpus.Gpu("a pretended GPU", 2 * gpus.CONTEXT_BYTES)]


def on_pretended_gpu(log: str, full: str, batch: ray_executor.Batch) -> Any:
    """Carry out a batch on the pretended device; note where, when, and with which share of a GPU.

    `full` is a tensor that does not fit the first time.
    """
    import ray

    if batch.device is None:
        assert all(task.device == "cpu" for task in batch.tasks)
        return ray_executor.carry_out_batch(batch)
    own = ray.get_runtime_context()
    noted: dict[str, Any] = {
        "tasks": [task.name for task in batch.tasks],
        "node": own.get_node_id(),
        "share": own.get_assigned_resources()["GPU"],
        "gpu": gpus.given_gpu(),
        "start": time.monotonic(),
    }
    run = tasks._run

    def run_there(*given: Any) -> Any:
        with pretended():
            return run(*given)

    @contextmanager
    def shared(name: str, device: object) -> Iterator[None]:
        assert (name, device) == (str(DEVICE), batch.device)
        yield

    try:
        if full in noted["tasks"] and noted["share"] < 1:
            raise DeviceFullError("device cuda:0 ran out of memory: something else uses it.")
        with (
            mock.patch.object(ray_executor, "given_gpu", lambda: str(DEVICE)),
            mock.patch.object(ray_executor, "own_share", shared),
            mock.patch.object(tasks, "_run", run_there),
        ):
            return ray_executor.carry_out_batch(batch)
    finally:
        with Path(log).open("a") as file:
            file.write(json.dumps({**noted, "stop": time.monotonic()}) + "\n")


def measured_on_pretended_gpu(log: str, asked: Any) -> Any:
    """Measure a pair on the pretended device; note which, and with which share of a GPU."""
    import ray

    from eutectic.evaluation import pairs, spread_pairs

    seen: list[str] = []
    outputs = pairs.outputs

    def noting(model: Any, *given: Any, **how: Any) -> Any:
        seen.append(next(model.parameters()).device.type)
        return outputs(model, *given, **how)

    with (
        mock.patch.object(spread_pairs, "given_gpu", lambda: str(DEVICE)),
        mock.patch.object(spread_pairs, "own_share", lambda *_: nullcontext()),
        mock.patch.object(pairs, "outputs", noting),
        pretended(),
    ):
        found = spread_pairs.measured(asked)
        kept = [own[0] for own in workers._kept.values()]
    noted = {
        "pair": [asked.checkpoint, asked.task],
        "ran": seen,
        "share": ray.get_runtime_context().get_assigned_resources()["GPU"],
        "waits": [next(own._loaded[1].parameters()).device.type for own in kept],
    }
    with Path(log).open("a") as file:
        file.write(json.dumps(noted) + "\n")
    return found


def adder_on_pretended_gpu(log: str, work: Any) -> Any:
    """Return a worker of a collection whose GPU is the pretended device; note its share of one."""
    import ray

    from eutectic.statistics import sharded_pass

    class Adder(sharded_pass._Adder):
        def __init__(self, work: Any) -> None:
            with (
                mock.patch.object(sharded_pass, "given_gpu", lambda: str(DEVICE)),
                mock.patch.object(sharded_pass, "own_share", lambda *_: nullcontext()),
                pretended(),
            ):
                super().__init__(work)

        def add(self, *given: Any) -> None:
            with pretended():
                super().add(*given)

        def state(self) -> Any:
            own = ray.get_runtime_context().get_assigned_resources()["GPU"]
            runs = next(self._job.model.parameters()).device.type
            with Path(log).open("a") as file:
                file.write(json.dumps([own, runs]) + "\n")
            with pretended():
                return super().state()

    return Adder(work)
