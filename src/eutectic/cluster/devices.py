"""Where methods compute and models run: the CPU, or an accelerator of this machine."""

from __future__ import annotations

import platform
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from eutectic.errors import RequestError, first_line

CPU = "cpu"
SHARE = 0.9  # of what is free on a device: the allocator needs some
MPS = "mps"
WITHOUT_FLOAT64 = frozenset({MPS})
_CUDA = re.compile(r"cuda(:\d{1,3})?")
_kept = threading.local()


class DeviceFullError(RequestError):
    """A device has no memory left for what is computed there."""


@dataclass(frozen=True)
class Device:
    """Where matrices are merged, or models run.

    Attributes:
        name: as torch has it; "cuda" alone is whichever GPU a worker of a cluster is given.
        model: what decides rounding, see `device_model`.
        memory: bytes that tasks may take there together (one task, on a worker of a cluster); None
            for the CPU, where memory is counted otherwise.
    """

    name: str = CPU
    model: str = ""
    memory: int | None = None


ON_CPU = Device()


def device_here(text: str) -> Device:
    """Return the device of this machine that is meant, see `device_named`."""
    name = device_named(text)
    return Device(name, device_model(name), device_memory(name))


def device_named(text: str) -> str:
    """Return the device that is meant, such as "cpu" or "cuda:0"; "auto": an accelerator, if any.

    Raises:
        RequestError: no such device, or one that methods cannot compute on.
    """
    name = text.strip().lower()
    if name == CPU:
        return CPU
    if name == MPS:
        raise RequestError(
            "methods cannot compute on mps: Apple's GPUs have no float64, in which Grams are "
            "decomposed.\nLeave the device out; models that are run may use it."
        )
    if name != "auto" and not _CUDA.fullmatch(name):
        raise RequestError(f"device is cpu, cuda, cuda:N or auto, got '{text}'.")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return f"cuda:{torch.cuda.current_device()}" if count else CPU
    if not count:
        built = "has no CUDA" if torch.version.cuda is None else "finds no CUDA device"
        raise RequestError(
            f"device {text}: torch {torch.__version__} {built} here.\n"
            "Leave the device out, or say auto, which takes one where there is one."
        )
    number = int(name.partition(":")[2] or torch.cuda.current_device())
    if number >= count:
        raise RequestError(f"device {text}: there are {count}, of numbers 0 to {count - 1}.")
    return f"cuda:{number}"


def device_of_models(text: str) -> str:
    """Return where a model runs: "auto" is CUDA, else mps, else the CPU; others are themselves.

    A model's forward pass is float32, so that mps serves, where matrices cannot be merged.

    Raises:
        RequestError: no such device here.
    """
    name = text.strip().lower()
    if name == CPU:
        return name
    if name == "auto" or _CUDA.fullmatch(name):
        found = device_named(name)
        return MPS if found == CPU and _has_mps() else found
    import torch

    if name == MPS:
        if _has_mps():
            return name
        raise RequestError(
            f"device mps: torch {torch.__version__} finds no GPU of Apple's here.\n"
            "Leave the device out, or say auto, which takes one where there is one."
        )
    try:
        if torch.empty(0, device=name).is_meta:
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"--device {name} cannot be used here: {first_line(error)}.\n"
            "Devices are cpu, cuda, cuda:N, mps and auto."
        ) from error
    return name


def models_here(text: str) -> Device:
    """Return the device of this machine that models run on, see `device_of_models`."""
    name = device_of_models(text)
    return Device(name, device_model(name))


def has_float64(kind: str) -> bool:
    """Tell whether a kind of device, `Tensor.device.type`, has that dtype."""
    return kind not in WITHOUT_FLOAT64


def _has_mps() -> bool:
    import torch

    return torch.backends.mps.is_available()


def device_memory(device: str) -> int | None:
    """Return the bytes that tasks may take of a device; None for the CPU."""
    if device == CPU:
        return None
    import torch

    return int(SHARE * torch.cuda.mem_get_info(device)[0])


def device_model(device: str) -> str:
    """Return what decides rounding: the kind of a device with its name; empty for the CPU."""
    kind = device.partition(":")[0]
    if kind == CPU:
        return ""
    if kind == MPS:
        return (
            f"{kind} {platform.processor() or platform.machine()} {platform.mac_ver()[0]}".strip()
        )
    import torch

    if kind != "cuda":
        return device
    return f"{device.partition(':')[0]} {torch.cuda.get_device_name(device)}"


@contextmanager
def computing_on(device: str) -> Iterator[None]:
    """Let this thread compute on a device in a stream of its own, beside other threads'.

    Raises:
        DeviceFullError: the device ran out of memory.
    """
    if not device.startswith("cuda"):
        yield
        return
    import torch

    streams = vars(_kept)
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    try:
        with torch.cuda.device(device), torch.cuda.stream(streams[device]):
            yield
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceFullError(
            f"device {device} ran out of memory: something else uses it.\n"
            "Run the same command again to go on, on the CPU without --device."
        ) from error


@contextmanager
def running_on(device: str) -> Iterator[None]:
    """Run models on a device; what it says of full memory comes in words.

    Raises:
        DeviceFullError: the device ran out of memory.
    """
    if device == CPU:
        yield
        return
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:  # the CPU's is a plain RuntimeError
        raise DeviceFullError(
            f"device {device} ran out of memory: the model and its batch need more.\n"
            "Take smaller batches or another device; what is finished is kept."
        ) from error
