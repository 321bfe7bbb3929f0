"""What every test takes for granted: no network, one computing thread."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402 - after the settings above

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin every process's share with its part of the slow tests.

    Work stealing deals out shares of equal size, one after the other, and then moves what is left:
    a process should have quick tests left at the end, and none all the slow ones.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    total = len(items)
    items.clear()
    for share in range(processes):
        own = slow[share::processes]
        room = (total - len(items)) // (processes - share) - len(own)
        items += own + quick[:room]
        del quick[:room]
