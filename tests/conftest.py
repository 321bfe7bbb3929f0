"""What every test takes for granted: no network, one computing thread."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402 - after the settings above
from hypothesis import HealthCheck, settings  # noqa: E402

torch.set_num_threads(1)
gc.set_threshold(50_000, 20, 20)  # a tenth of the time went into looking at what stays anyway

# The same cases in every run, however slow the machine is.
settings.register_profile(
    "seeded",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("seeded")


# Imports of files that run models; transformers alone takes longer than the rest of a quick run.
_MODELS = re.compile(
    r"^\s*(from|import)\s.*\b(transformers|peft|datasets|world|configs|models|tiny_models)\b"
    r"|^(\w+ = )?pytest\.importorskip",
    re.M,
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take options of this test suite."""
    parser.addoption(
        "--quick", action="store_true", help="leave out slow tests and files that run models"
    )
    parser.addoption(
        "--every-call",
        action="store_true",
        help="tests/faults/test_system_calls.py: every system call of every verb, not some",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files that run models where `--quick` asks for it, before they are imported."""
    if config.getoption("--quick") and collection_path.match("test_*.py"):
        return bool(_MODELS.search(collection_path.read_text(encoding="utf-8"))) or None
    return None


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of every further look for garbage."""
    gc.freeze()


def _patience(item: pytest.Item) -> float:
    """Return the seconds that a test may take, where it says so: those that take long do."""
    marker = item.get_closest_marker("timeout")
    return marker.args[0] if marker else 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin every process's share with its part of the slow tests.

    Work stealing deals out shares of equal size, one after the other, and then moves what is left:
    a process should have quick tests left at the end, and none all the slow ones.
    """
    slow = [item for item in items if item.get_closest_marker("slow")]
    slow.sort(key=_patience, reverse=True)  # the longest go to one process each
    quick = [item for item in items if not item.get_closest_marker("slow")]
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=slow)
        items[:], slow = quick, []
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    total = len(items)
    items.clear()
    for share in range(processes):
        own = slow[share::processes]
        room = (total - len(items)) // (processes - share) - len(own)
        items += own + quick[:room]
        del quick[:room]
