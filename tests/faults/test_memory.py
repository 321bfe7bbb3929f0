"""Resident memory against the plan.

Guards the promise that a merge stays under its plan's estimate, whatever the size of the files.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.cli import invoke
from helpers.folders import save
from helpers.processes import run_cli

SLACK = 300_000_000


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ties", "iso_c"])
def test_peak_memory_stays_under_the_plan(method: str, large: Path) -> None:
    experts = [f"{name}={large / name}" for name in "abc"]
    request = ["--base", large / "base", "-m", method, "--threads", 2, "--json", *experts]
    plan = json.loads(invoke("plan", *request).out)
    result = run_cli("merge", *request, "-o", large / f"merged-{method}")
    assert result.returncode == 0, result.stderr
    peak = json.loads(result.stdout)["peak_bytes"]
    assert peak < plan["cost"]["peak_bytes"] + SLACK


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three experts of 134 MB each, so that reading them whole would show."""
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (24576, 1024), **{f"w{i}.weight": (1024, 1024) for i in range(8)}}
    base = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    save(folder / "base", base)
    for i, name in enumerate("abc"):
        noise = torch.Generator().manual_seed(i + 1)
        save(
            folder / name,
            {n: w + 0.1 * torch.randn(w.shape, generator=noise) for n, w in base.items()},
        )
    return folder
