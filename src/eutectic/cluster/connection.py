"""The Ray cluster that work is spread over: joined, or started on this machine, and its size."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from eutectic.errors import MissingExtraError, RequestError, first_line

OBJECT_STORE_BYTES = 128_000_000  # of a cluster that is started here; results are small
_PATIENCE = 10.0  # seconds until an address counts as silent
_TOKEN = "RAY_AUTH_MODE=token and its token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
# Ray reports nothing of this to anybody, leaves the devices of tasks as they are, and lets workers
# that it starts here run like any process of the user's: by default everything else goes first.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
}


@dataclass(frozen=True)
class Cluster:
    """What a cluster has for tasks.

    Attributes:
        cpus: cores, over all machines.
        memory: bytes that Ray gives to tasks, over all machines.
        largest: bytes of the machine that has most.
        gpus: GPUs, over all machines.
        machines: how many there are.
        largest_with_gpu: bytes of the machine with a GPU that has most; 0 without any.
    """

    cpus: int
    memory: int
    largest: int
    gpus: float
    machines: int
    largest_with_gpu: int = 0


@dataclass
class _Connection:
    """What this process has connected to by itself."""

    asked: tuple[Any, ...] | None = None  # None: nothing, or the user's own `ray.init`
    folder: str | None = field(default=None)  # of a cluster that was started here


_connection = _Connection()


def import_ray() -> Any:
    """Return the package `ray`; MissingExtraError where it is not installed."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "ray", "--executor ray") from None
    return ray


@dataclass(frozen=True)
class Share:
    """What a cluster that is started here may use of this machine."""

    cpus: int
    memory: int  # bytes for tasks


def connect(
    address: str | None = None, *, wanted: object = None, share: Callable[[], Share]
) -> Cluster:
    """Join a cluster, or start one on this machine, and return what it has.

    Args:
        address: `HOST:PORT` of a head node, `auto` for the cluster that runs on this machine, or
            None: the address in `RAY_ADDRESS` if there is one, else a cluster is started here. A
            connection that the process has already is used.
        wanted: what the user asked for of this machine. A cluster that was started here for
            another wish ends, and one for this wish begins.
        share: what a cluster that is started here may use.

    Raises:
        MissingExtraError: ray is not installed.
        RequestError: nobody answers at the address, or the process is connected to another one.
    """
    ray = import_ray()
    place = address or os.environ.get("RAY_ADDRESS") or None
    asked = (place, None if place else wanted)
    if ray.is_initialized() and _connection.asked not in (None, asked):
        disconnect()  # this process has made the connection: nobody else relies on it
    if not ray.is_initialized():
        _begin(ray, place, share)
        _connection.asked = asked
    elif address is not None and address != "auto" and _connection.asked is None:
        found = ray.get_runtime_context().gcs_address
        if found != address:
            raise RequestError(
                f"this process is connected to the Ray cluster at {found}, not {address}.\n"
                "Leave the address out to use that connection, or call ray.shutdown() first."
            )
    return size_of_cluster()


def disconnect() -> None:
    """Leave the cluster; one that was started here ends, and nothing is left of it."""
    import_ray().shutdown()
    _connection.asked = None
    if _connection.folder is not None:
        shutil.rmtree(_connection.folder, ignore_errors=True)
        _connection.folder = None


def size_of_cluster() -> Cluster:
    """Return what the machines that are alive have together, and the largest one alone."""
    alive = [node["Resources"] for node in import_ray().nodes() if node["Alive"]]
    own = [resources for resources in alive if resources.get("CPU", 0) >= 1]  # the others run none

    def total(name: str) -> float:
        return sum(resources.get(name, 0) for resources in own)

    def largest(machines: list[Any]) -> int:
        return int(max((resources.get("memory", 0) for resources in machines), default=0))

    cpus, with_gpu = max(1, int(total("CPU"))), [r for r in own if r.get("GPU", 0) > 0]
    sizes = (cpus, int(total("memory")), largest(own))
    return Cluster(*sizes, total("GPU"), len(own), largest(with_gpu))


def machines_with_gpus() -> list[str]:
    """Return the ids of the machines on which a task can have a GPU."""
    return [
        node["NodeID"]
        for node in import_ray().nodes()
        if node["Alive"]
        and node["Resources"].get("GPU", 0) > 0
        and node["Resources"].get("CPU", 0) >= 1
    ]


def _begin(ray: Any, address: str | None, share: Callable[[], Share]) -> None:
    options: dict[str, Any] = {
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address is None:
        # Ray's sockets lie in its folder, and their names must be short.
        short = "/tmp" if os.name == "posix" else None
        _connection.folder = tempfile.mkdtemp(prefix="eutectic-ray-", dir=short)
        atexit.register(disconnect)  # before Ray's own, which would leave the folder
        options |= {
            "address": "local",
            "num_cpus": (own := share()).cpus,
            "_memory": own.memory,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": _connection.folder,
        }
    else:
        _check_answers(address)
        _check_token(ray, address)
        del options["include_dashboard"]
        options["address"] = address
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises a bare one where its processes start too slowly
        disconnect()  # some of them may be there
        if address is None:
            raise RequestError(
                f"Ray could not start a cluster on this machine: {first_line(error)}\n"
                "A machine that is very busy is too slow for it: repeat the command later, or "
                "leave --executor ray out. One that runs already is named by --ray-address."
            ) from None
        raise RequestError(
            f"the Ray cluster at {address} cannot be joined: {first_line(error)}\n"
            "Is one running there (`ray start --head`), of the version that is installed here?\n"
            f"One that asks for a token (Ray 2.59 and newer) needs {_TOKEN}."
        ) from None
    _quieten()


def _check_answers(address: str) -> None:
    """Refuse an address where nobody listens; Ray itself would try for minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise RequestError(
            f"the Ray address '{address}' must be HOST:PORT, such as 10.0.0.5:6379, or auto."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except OSError as error:
        raise RequestError(
            f"nobody answers at the Ray address {address} ({error.strerror or error}).\n"
            "Is the head node running (`ray start --head --port 6379`), and the port open?"
        ) from None


def _check_token(ray: Any, address: str) -> None:
    """Refuse a wrong token, and a missing one, at once; Ray itself would try it twenty times."""
    refusal = getattr(ray.exceptions, "AuthenticationError", None)
    if refusal is None or address in ("auto", "local") or address.startswith("ray://"):
        return
    try:
        from ray._private.authentication import authentication_token_setup as setup

        # Without a token, where one is asked for, what comes next would end this process.
        setup.ensure_token_if_auth_enabled(create_token_if_missing=False)
        ray._raylet.GcsClient(address=address)
    except refusal:
        raise RequestError(
            f"the Ray cluster at {address} asks for a token, and has not got the right one.\n"
            f"It needs {_TOKEN}."
        ) from None
    except Exception:  # of other versions, or of what `ray.init` will tell
        return


def _quieten() -> None:
    """Keep Ray from printing on stdout, among answers, which workers it has lost: we tell of it."""
    with contextlib.suppress(ImportError, AttributeError):
        from ray._private import worker

        worker.print_to_stdstream = lambda *_, **__: None
