"""A suite's table on a real cluster: the rows that one process measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.processes import run_script

pytestmark = [pytest.mark.ray, pytest.mark.slow]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = ("task_arithmetic", "mats_task_arithmetic_kronecker_3")
CLASSES = 5


def pictures(count: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Return noise with labels that mean nothing."""
    return {
        "images": torch.randint(0, 255, (count, 32, 32), generator=draw, dtype=torch.uint8),
        "labels": torch.randint(CLASSES, (count,), generator=draw),
    }


def suite(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write an untrained base, two experts near it, heads and pictures."""
    monkeypatch.syspath_prepend(BENCHMARKS / "glyphs")
    import model

    from data import TASKS

    draw = torch.Generator().manual_seed(0)
    model.save(model.new_model(), work / "base")
    base = load_file(work / "base" / "model.safetensors")
    for task in TASKS[:2]:
        changed = {
            name: value + 0.02 * torch.randn(value.shape, generator=draw)
            if value.is_floating_point()
            else value
            for name, value in base.items()
        }
        (work / "experts" / task).mkdir(parents=True)
        save_file(changed, work / "experts" / task / "model.safetensors", {"format": "pt"})
        head = {"weight": torch.randn(CLASSES, model.HIDDEN, generator=draw)}
        head["bias"] = torch.zeros(CLASSES)
        (work / "heads").mkdir(exist_ok=True)
        save_file(head, work / "heads" / f"{task}.safetensors")
        splits = {
            f"{split}_{key}": value
            for split, count in (("train", 60), ("validation", 30), ("test", 60))
            for key, value in pictures(count, draw).items()
        }
        (work / "data").mkdir(exist_ok=True)
        save_file(splits, work / "data" / f"{task}.safetensors")


def table(work: Path, *words: str) -> tuple[dict[str, Any], str]:
    asked = ("glyphs", "--work", str(work), "--tasks", "2", "--seeds", "1", "--rows", *ROWS)
    settings = ("--in-process", "--no-alignment", "--label-free", "--test-texts", "40")
    done = run_script(BENCHMARKS / "table" / "run.py", *asked, *settings, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    results = work / "results" / "glyphs-hard-2"
    rows = {name: json.loads((results / f"{name}-0.json").read_text()) for name in ROWS}
    for row in rows.values():
        del row["seconds"], row["peak_bytes"]
    return rows, done.stdout


def test_rows_are_those_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    for name in ("alone", "ray"):
        suite(tmp_path / name, monkeypatch)
    alone, _ = table(tmp_path / "alone", "--threads", "1")
    monkeypatch.chdir(tmp_path)
    spread, told = table(Path("ray"), "--executor", "ray", "--ray-address", address)
    assert spread == alone
    # Statistics, then what others begin with, then all others: each of them on workers.
    stages = [line.split(":")[0] for line in told.splitlines() if line.endswith(" minutes")]
    assert stages == ["statistics", "initial merges", "merges"]
    assert len(set(map(str, alone.values()))) == len(ROWS)


def test_a_command_that_fails_says_why(
    monkeypatch: pytest.MonkeyPatch, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from table.spreading import Workers

    from eutectic.cluster.where import joined

    found = joined(address)
    workers = Workers(found.cpus, found.memory)
    failing = ["sh", "-c", "seq 30; echo no such row >&2; exit 3"]
    with pytest.raises(SystemExit, match=r"Not all of it was made \(merges\); the same command"):
        workers.share([["true"], failing], "merges")
    told = capsys.readouterr().err.splitlines()
    assert told == [" ".join(failing), *map(str, range(12, 31)), "no such row"]
    assert workers.codes([["sh", "-c", f"exit {n}"] for n in (0, 0)]) == [0, 0]
