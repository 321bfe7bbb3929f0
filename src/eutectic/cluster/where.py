"""Where work is carried out: in this process or by a cluster's workers, and with how much."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypedDict, cast, get_args

import psutil

from eutectic.cluster.connection import Cluster, Share, connect
from eutectic.errors import RequestError, suggest

MEMORY_SHARE = 0.6


def default_threads() -> int:
    """Return the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores or 1)


def default_memory() -> int:
    """Return 60 % of what is available to this process, cgroup limits included."""
    available = psutil.virtual_memory().available
    groups = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            free = int((groups / limit).read_text()) - int((groups / used).read_text())
            available = min(available, max(free, 0))
    return int(MEMORY_SHARE * available)


ExecutorName = Literal["threads", "ray"]


class Where(TypedDict, total=False):
    """Keywords of the public entries that say where tasks are carried out."""

    executor: ExecutorName
    ray_address: str | None


class MergeWhere(Where, total=False):
    """The same of merges, whose methods may compute on a device."""

    device: str


def taken_where(options: dict[str, Any]) -> Where:
    """Take those keywords out of others, such as keys of a recipe."""
    return cast("Where", {key: options.pop(key) for key in Where.__annotations__ if key in options})


def taken_for_merge(options: dict[str, Any]) -> MergeWhere:
    """Take those of a merge."""
    where: MergeWhere = {**taken_where(options)}
    if "device" in options:
        where["device"] = options.pop("device")
    return where


def check_where(executor: str, ray_address: str | None) -> None:
    """Raise RequestError for an executor that is not there, or an address that plays no part."""
    if executor not in get_args(ExecutorName):
        near = suggest(str(executor), get_args(ExecutorName))
        raise RequestError(f"executor is threads or ray, got '{executor}'.{near}")
    if ray_address is not None and executor != "ray":
        raise RequestError(
            f"the address {ray_address} is that of a Ray cluster, and the executor is {executor}."
            "\nChoose the executor ray, or leave the address out."
        )


def joined(
    ray_address: str | None, threads: int | None = None, memory: int | None = None
) -> Cluster:
    """Join the cluster at an address, or start one here with so many cores and bytes for tasks.

    Without them, it has the cores of this process and 60 % of the free memory.
    """

    def share() -> Share:
        return Share(threads or default_threads(), memory or default_memory())

    return connect(ray_address, wanted=(threads, memory), share=share)
