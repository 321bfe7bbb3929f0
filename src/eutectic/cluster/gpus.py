"""GPUs of a cluster: what its machines have, and the one that a task is given."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from eutectic.cluster.connection import import_ray, machines_with_gpus
from eutectic.cluster.devices import (
    CPU,
    MPS,
    ON_CPU,
    Device,
    device_here,
    device_memory,
    device_model,
)
from eutectic.cluster.workers import Answer, answer, versions
from eutectic.errors import EutecticError, RequestError

CUDA = "cuda"
# What a process takes of a GPU before its first tensor, by what drivers are known to take; a call
# that gets too little is done again with more.
CONTEXT_BYTES = 600_000_000
LEAST_SHARE = 1 / 8  # of a GPU: more processes on one are no faster, and each has its context
_STEPS = 1000  # shares are rounded up to a thousandth; Ray counts ten thousandths
_PATIENCE = 120.0  # seconds until a machine that does not say what it has counts as lost
# Workers see all GPUs of their machine and compute on the one that they are given: one that is
# used again keeps its context, and may be given another GPU than before.
ALL_VISIBLE = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}


@dataclass(frozen=True)
class Gpu:
    """A GPU of a machine."""

    model: str  # what decides rounding
    free: int  # bytes that tasks may take


def device_of_workers(text: str) -> Device:
    """Return the device of a cluster's workers that is meant: the CPU, or whichever GPU is given.

    "auto" is a GPU where the cluster has any. The memory is that of one task on the smallest GPU,
    beside its process's own. This process needs no GPU.

    Raises:
        RequestError: there is no GPU, Ray chooses which, or GPUs of several kinds, on which the
            bytes would depend on who carries out what.
    """
    name = text.strip().lower()
    if name == CPU:
        return ON_CPU
    if name.startswith(f"{CUDA}:"):
        raise RequestError(
            f"device {text}: Ray chooses which GPU of a machine a task is given.\n"
            "Say cuda, and start the node with CUDA_VISIBLE_DEVICES if it shall use some only."
        )
    if name == MPS:
        raise RequestError(
            "device mps: Ray knows of no GPUs of Apple's.\nLeave the device out, or the executor."
        )
    if name not in (CUDA, "auto"):
        device_here(text)  # tells what else is wrong with it
    nodes = machines_with_gpus()
    if not nodes:
        if name == "auto":
            return ON_CPU
        raise RequestError(
            "device cuda: no machine of the cluster has a GPU that Ray knows of.\n"
            "Start one with `ray start --num-gpus`, or leave the device out."
        )
    found = _asked(nodes)
    without = [place for place, gpus in found.items() if not gpus]
    if without and name == "auto" and len(without) == len(found):
        return ON_CPU
    if without:
        raise RequestError(
            f"worker {without[0]}: Ray knows of a GPU there, and torch finds none it can use.\n"
            "Install a torch with CUDA on it, or start that node with --num-gpus 0."
        )
    models: dict[str, str] = {}
    for place, gpus in found.items():
        for gpu in gpus:
            models.setdefault(gpu.model, place)
    if len(models) > 1:
        listed = ", ".join(f"{model} on {place}" for model, place in sorted(models.items()))
        raise RequestError(
            f"the cluster has several kinds of GPUs ({listed}): the bytes would depend on who "
            "merges what.\nUse machines of one kind, or leave the device out."
        )
    least = min(gpu.free for gpus in found.values() for gpu in gpus)
    return Device(CUDA, next(iter(models)), max(0, least - CONTEXT_BYTES))


def share_of(device: Device, peak: int) -> float:
    """Return the share of a GPU that a task asks for, whose tensors take `peak` bytes there."""
    whole = (device.memory or 0) + CONTEXT_BYTES
    share = math.ceil(_STEPS * (peak + CONTEXT_BYTES) / whole) / _STEPS
    return min(1.0, max(LEAST_SHARE, share))


def gpus_here(_: object) -> list[Gpu]:
    """Return the GPUs of the machine that this runs on; empty where torch finds none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [f"{CUDA}:{number}" for number in range(count)]
    return [Gpu(device_model(name), device_memory(name) or 0) for name in names]


def _asked(nodes: Sequence[str]) -> dict[str, list[Gpu]]:
    """Return what the GPUs of machines are, by their addresses, as those say themselves."""
    ray = import_ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    # Once in a process, which ends: its contexts shall not stay on every GPU.
    remote = ray.remote(num_cpus=0, max_calls=1, max_retries=1)(_on_worker)
    asked = [
        remote.options(
            scheduling_strategy=On(node, soft=False), runtime_env=ALL_VISIBLE, name="GPUs"
        ).remote(gpus_here, versions())
        for node in nodes
    ]
    found: dict[str, list[Gpu]] = {}
    for reference in asked:
        said = _fetched(reference)
        found.setdefault(said.node, []).extend(said.value)
    return found


def _fetched(reference: object) -> Answer:
    """Return what a machine answers, or raise what it raised."""
    ray, until = import_ray(), time.monotonic() + _PATIENCE
    while True:  # a wait without an end could not be interrupted everywhere
        done, _ = ray.wait([reference], timeout=0.5)
        if done:
            break
        if time.monotonic() > until:
            raise EutecticError(
                f"a machine with a GPU did not answer for {_PATIENCE:g} s.\n"
                "Look at `ray status`, or leave the device out."
            )
    try:
        said: Answer = ray.get(reference)
    except ray.exceptions.RayError as error:
        raise EutecticError(
            f"a machine with a GPU cannot say what it has: {type(error).__name__}.\n"
            "Install eutectic, in the same version as here, on every machine of the cluster."
        ) from error
    if said.kind is not None:
        raise said.error()
    return said


def _on_worker(function: object, expected: dict[str, str]) -> Answer:
    import ray

    return answer(function, None, expected, ray.util.get_node_ip_address())  # type: ignore[arg-type]


def given_gpu() -> str:
    """Return the GPU that Ray has given this call, as torch numbers them in this process."""
    [own, *_] = import_ray().get_gpu_ids()
    visible = [x.strip() for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
    number = visible.index(str(own)) if str(own) in visible else int(own)
    return f"{CUDA}:{number}"


@contextmanager
def own_share(name: str, device: Device) -> Iterator[None]:
    """Keep this process within the share of a GPU that its call has, and give back the rest.

    Raises:
        RequestError: the GPU is of another kind than those that the run began with.
    """
    import torch

    model = device_model(name)
    if model != device.model:
        raise RequestError(
            f"device {name} is {model}, and this run began on {device.model}: bytes might differ.\n"
            "Take the machine out of the cluster, or leave the device out."
        )
    share = import_ray().get_runtime_context().get_assigned_resources().get("GPU", 1.0)
    room = share * ((device.memory or 0) + CONTEXT_BYTES) - CONTEXT_BYTES
    total = torch.cuda.get_device_properties(name).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(room, 1) / total), name)
    try:
        yield
    finally:
        with suppress(RuntimeError):  # of a device that failed: what failed there is told
            torch.cuda.empty_cache()
