"""A killed evaluation: the same command goes on, and says what an undisturbed one says."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from eutectic.evaluation import pairs
from evaluation import world
from helpers.cli import invoke
from helpers.processes import start_cli

LABELS = ("no", "maybe", "yes")
# Waits while a file says so: the kill comes in the middle, whatever the machine's speed.
HOLDING = """
import pathlib, time
def f(folder, rows):
    here = pathlib.Path(__file__).parent
    if (here / "hold").exists() and folder.endswith("second"):
        (here / "reached").touch()
        time.sleep(600)
    return [len(row["text"]) for row in rows]
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sigkill_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = world.sentences(30)
    rows = [{"text": t, "label": LABELS[i % 3]} for i, t in enumerate(texts)]
    world.jsonl(tmp_path / "d.jsonl", rows)
    (tmp_path / "f.py").write_text(HOLDING)
    kind = "text-classification"
    path = world.tasks(
        tmp_path / "t.yaml",
        a={"kind": kind, "data": "d.jsonl"},
        b={"kind": kind, "data": "d.jsonl", "expert": "a", "metric": "macro_f1"},
        c={"kind": "function", "function": "f.py:f", "data": "d.jsonl", "expert": "a"},
    )
    for seed, name in enumerate(("base", "expert", "first", "second", "third")):
        world.save(world.make("bert", seed=seed), tmp_path / name)
    line = ["evaluate", "--tasks", path, "--base", tmp_path / "base", "--trust-code"]
    line += ["-e", f"a={tmp_path / 'expert'}", "--resamples", 50]
    line += [f"{name}={tmp_path / name}" for name in ("first", "second", "third")]
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"

    (tmp_path / "hold").touch()
    process = start_cli(*line, "-o", killed)
    while not (tmp_path / "reached").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, told = process.communicate()
    assert process.returncode == -signal.SIGKILL, told
    (tmp_path / "hold").unlink()
    journal = Path(f"{killed}.outcomes.jsonl")
    before = journal.read_text()
    finished = [(p["checkpoint"], p["task"]) for p in map(json.loads, before.splitlines())]
    assert len(finished) == 3 + 3 + 3 + 2 and finished[-1] == ("second", "b")
    assert not killed.exists()

    models: list[int] = []
    functions: list[str] = []
    outputs, function = pairs.outputs, pairs.call_function
    monkeypatch.setattr(pairs, "outputs", lambda *w, **k: models.append(1) or outputs(*w, **k))
    monkeypatch.setattr(
        pairs,
        "call_function",
        lambda t, f, *w, **k: functions.append(f.name) or function(t, f, *w, **k),
    )
    assert invoke(*line, "-o", killed).code == 0
    assert (len(models), functions) == (2, ["second", "third"])
    assert journal.read_text().startswith(before)  # nothing is written again
    assert invoke(*line, "-o", whole).code == 0
    assert (len(models), len(functions)) == (2 + 10, 2 + 5)
    assert json.loads(killed.read_text()) == json.loads(whole.read_text())
    assert journal.read_text() == Path(f"{whole}.outcomes.jsonl").read_text()
