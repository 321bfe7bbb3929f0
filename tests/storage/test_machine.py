"""The package on a system without Unix's own modules and calls; cores and memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import eutectic
from eutectic.execution import executors as machine
from helpers.folders import digests, make_base, make_expert, save

# Stands for Windows as far as one can from here: no fcntl, no resource, no calls that take an
# offset, no /proc. Locks are then those that filelock builds on files alone.
HIDDEN = textwrap.dedent(
    """
    import importlib, os, pkgutil, sys, warnings
    from pathlib import Path

    import psutil, torch  # on Linux, they use these modules themselves

    for name in ("fcntl", "resource"):
        sys.modules[name] = None
    for name in (
        "preadv", "pread", "pwrite", "pwritev", "posix_fallocate", "posix_fadvise",
        "sched_getaffinity",
    ):
        if hasattr(os, name):
            delattr(os, name)

    # filelock says that its locks are less sure here.
    warnings.filterwarnings("ignore", "only soft file lock")
    import eutectic

    for module in pkgutil.walk_packages(eutectic.__path__, "eutectic."):
        importlib.import_module(module.name)

    folder = Path(sys.argv[1])
    report = eutectic.merge(
        base=folder / "base",
        experts={"a": folder / "a", "b": folder / "b"},
        method="esm", fallback="allow",
        output=folder / "hidden",
    )
    assert report.peak_bytes > 0
    """
)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_merge_without_unix(tmp_path: Path) -> None:
    base = make_base()
    save(tmp_path / "base", base)
    for seed, name in enumerate("ab"):
        heads = {"classifier.weight": torch.ones(seed + 2, 16)}
        save(tmp_path / name, {**make_expert(base, seed), **heads})
    command = [sys.executable, "-W", "error", "-c", HIDDEN, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    eutectic.merge(
        base=tmp_path / "base",
        experts={"a": tmp_path / "a", "b": tmp_path / "b"},
        method="esm",
        fallback="allow",
        output=tmp_path / "ordinary",
    )
    assert digests(tmp_path / "hidden") == digests(tmp_path / "ordinary")
    assert "experts/a/config.json" in digests(tmp_path / "hidden")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "base", "hidden", "ordinary"]


def test_cores_and_memory_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.default_threads() >= 1
    assert 0 < machine.default_memory() < machine.psutil.virtual_memory().total
    ordinary = machine.peak_bytes()
    monkeypatch.setattr(Path, "exists", lambda self: False)  # no /proc
    assert 0 < machine.peak_bytes() <= 1.5 * ordinary
