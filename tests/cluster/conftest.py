"""A real cluster of three nodes on this machine, for every test that is marked `ray`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MEMORY = 3_000_000_000  # that each node gives to tasks
STORE = 80_000_000


@pytest.fixture(scope="session")
def nodes() -> Iterator[Any]:
    """Start three nodes of a core each, and connect this process; the first is the driver's."""
    pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_worker_niceness"] = "0"  # else they starve beside the other tests
    folders = [str(Path(__file__).parents[2] / "src"), str(Path(__file__).parents[1])]
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    from ray.cluster_utils import Cluster

    from eutectic.cluster.connection import disconnect

    place = tempfile.mkdtemp(prefix="eu-", dir="/tmp")  # names of sockets must be short
    own: dict[str, Any] = {"num_cpus": 1, "memory": MEMORY, "object_store_memory": STORE}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**own, "include_dashboard": False, "temp_dir": place},
    )
    try:
        for _ in range(2):
            cluster.add_node(wait=False, **own)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        disconnect()
        cluster.shutdown()
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def address(nodes: Any) -> str:
    """Return the cluster's address."""
    assert sys.platform == "linux"
    return str(nodes.address)
