"""Where methods compute: the CPU, or an accelerator of this machine."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from eutectic.errors import RequestError

CPU = "cpu"
SHARE = 0.9  # of what is free on a device: the allocator needs some
_CUDA = re.compile(r"cuda(:\d{1,3})?")
_kept = threading.local()


class DeviceFullError(RequestError):
    """A device has no memory left for what is computed there."""


@dataclass(frozen=True)
class Device:
    """Where matrices are merged.

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
    if name == "mps":
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
    """
    name = text.strip().lower()
    if name != "auto":
        return name
    import torch

    found = device_named(name)
    return "mps" if found == CPU and torch.backends.mps.is_available() else found


def device_memory(device: str) -> int | None:
    """Return the bytes that tasks may take of a device; None for the CPU."""
    if device == CPU:
        return None
    import torch

    return int(SHARE * torch.cuda.mem_get_info(device)[0])


def device_model(device: str) -> str:
    """Return what decides rounding: the kind of a device with its name; empty for the CPU."""
    if device == CPU:
        return ""
    import torch

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
