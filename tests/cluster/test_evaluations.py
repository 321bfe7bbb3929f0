"""Evaluations on a real cluster: the figures of one process, and a journal that either takes up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import eutectic
from eutectic.evaluation import pairs as pairs_file
from eutectic.evaluation import spread_pairs
from evaluation import world

pytestmark = [pytest.mark.ray, pytest.mark.slow]
LABELS = ("no", "maybe", "yes")


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two models and an expert over two tasks, by paths that begin where one works."""
    monkeypatch.chdir(tmp_path)
    for count, name in ((20, "one"), (12, "two")):
        rows = [{"text": t, "label": LABELS[i % 3]} for i, t in enumerate(world.sentences(count))]
        world.jsonl(tmp_path / f"{name}.jsonl", rows)
    both: dict[str, Any] = {
        name: {"kind": "text-classification", "data": f"{name}.jsonl"} for name in ("one", "two")
    }
    for seed, name in enumerate(("m", "n", "e")):
        world.save(world.make("bert", seed=seed), tmp_path / name)
    experts: dict[str, Any] = {"one": "e"}
    models: dict[str, Any] = {"m": "m", "n": "n"}
    return {
        "tasks": world.tasks(tmp_path / "tasks.yaml", **both),
        "experts": experts,
        "models": models,
    }


def test_workers_measure_what_one_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, asked: dict[str, Any]
) -> None:
    where: dict[str, Any] = {"executor": "ray", "ray_address": address}
    told: list[tuple[float, float]] = []
    found = eutectic.evaluate(
        **asked,
        output=tmp_path / "ray.json",
        progress=lambda done, total, _: told.append((done, total)),
        **where,
    )
    assert told[-1] == (84, 84)
    assert told == sorted(told)
    alone = eutectic.evaluate(**asked, output=tmp_path / "alone.json")
    for one, other in zip(found.results, alone.results, strict=True):
        assert one == other
    assert (tmp_path / "ray.json").read_bytes() == (tmp_path / "alone.json").read_bytes()

    # A journal that lost two pairs has these measured again, and only these, by either.
    journal = tmp_path / "ray.json.outcomes.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    assert {(json.loads(line)["checkpoint"], json.loads(line)["task"]) for line in lines} == {
        ("one", "one"), ("m", "one"), ("m", "two"), ("n", "one"), ("n", "two"),
    }  # fmt: skip
    journal.write_text("".join(lines[:3]))
    asked_of: list[str] = []
    spread = spread_pairs.spread
    monkeypatch.setattr(
        spread_pairs,
        "spread",
        lambda calls, bounds: (asked_of.extend(c.name for c in calls), spread(calls, bounds))[1],
    )
    eutectic.evaluate(**asked, output=tmp_path / "ray.json", **where)
    assert len(asked_of) == 2
    monkeypatch.setattr(pairs_file, "outputs", None)  # nothing is left to be computed here
    eutectic.evaluate(**asked, output=tmp_path / "ray.json")


def test_a_worker_that_sees_another_checkpoint_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, asked: dict[str, Any]
) -> None:
    monkeypatch.setattr(pairs_file.Pairs, "identified", lambda *_: "another")
    with pytest.raises(eutectic.EutecticError, match="has another content here"):
        eutectic.evaluate(**asked, executor="ray", ray_address=address)


def test_options_of_a_cluster_without_one_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(eutectic.EutecticError, match="the executor is threads"):
        eutectic.evaluate(**asked, ray_address="10.0.0.5:6379")
