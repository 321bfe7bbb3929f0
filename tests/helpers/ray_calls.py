"""Calls that workers of a cluster import: they fail, die and dawdle as a test asks them to."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from eutectic.errors import NumericalError, RecipeError
from eutectic.execution import ray_executor


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
