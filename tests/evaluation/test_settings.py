"""What `evaluate` is told, checked before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

import eutectic
from eutectic.errors import RequestError
from evaluation import world
from helpers.cli import invoke


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and labelled texts."""
    rows = [{"text": t, "label": i % 3} for i, t in enumerate(world.sentences(40))]
    world.jsonl(tmp_path / "texts.jsonl", rows)
    world.save(world.make("bert"), tmp_path / "m")
    world.tasks(tmp_path / "tasks.yaml", a={"kind": "text-classification", "data": "texts.jsonl"})
    return tmp_path


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": "float16"}, "dtype is one of float32, bfloat16; got 'float16'"),
        ({"routing": "best"}, "routing is one of"),
        ({"split": "tset"}, r"got 'tset'\. Did you mean 'test'"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"seed": -1}, "seed must be"),
        ({"resamples": -1}, "resamples must be"),
    ],
)
def test_settings_are_checked_before_any_work(folder: Path, setting, message: str):
    with pytest.raises(RequestError, match=message):
        eutectic.evaluate(folder / "tasks.yaml", models=[folder / "m"], **setting)


def test_proxy_data_of_several_files(folder: Path):
    for i, number in enumerate((50, 3)):  # the second file holds a row of the test data
        row = {"text": world.sentences(60)[number]}
        world.jsonl(folder / f"p{i}.jsonl", [row])
    files = [folder / "p0.jsonl", folder / "p1.jsonl"]
    request = {"tasks": folder / "tasks.yaml", "models": [folder / "m"], "resamples": 0}
    found = eutectic.evaluate(**request, proxy={"a": str(files[0])})
    assert found.tasks[0].splits == {"proxy": 1, "test": 40}
    with pytest.raises(RequestError, match="proxy and test share 1 of 40"):
        eutectic.evaluate(**request, proxy={"a": files})
    words = ["evaluate", folder / "m", "-t", folder / "tasks.yaml"]
    words += [w for file in files for w in ("--proxy", f"a={file}")]
    assert "proxy and test share 1 of 40" in invoke(*words).err
