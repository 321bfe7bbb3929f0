"""A path that leads nowhere is told with the one that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from eutectic.storage import meant
from helpers.cli import invoke


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("base", "models/sst2", "models/mnli"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models" / "have.stats.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("./bas", " Did you mean 'base'?"),
        ("models/sst", " Did you mean 'models/sst2'?"),
        ("model/sst2", " Did you mean 'models/sst2'?"),
        ("model/qqp", ""),  # the folder was meant, but nothing of that name is in it
        ("other", ""),
        ("models/have", " Did you mean 'models/have.stats.safetensors'?"),
        ("base", ""),
        ("s3://bucket/bas", ""),
        ("", ""),
    ],
)
def test_meant(here: Path, typed: str, said: str) -> None:
    assert meant(typed) == said


def test_absolute(here: Path) -> None:
    assert meant(here / "models" / "mnl") == f" Did you mean '{here / 'models' / 'mnli'}'?"


def test_of_a_folder_of_very_many_names_none_is_proposed(here: Path) -> None:
    for number in range(2001):
        (here / "models" / f"sst-{number}").touch()
    assert meant("models/sst-x") == ""


@pytest.mark.parametrize(
    "words",
    [
        (
            "merge",
            "--base",
            "./base",
            "-m",
            "average",
            "-o",
            "out",
            "a=models/sst",
            "b=models/mnli",
        ),
        ("merge", "models/sst/recipe.yaml", "-o", "out"),
        ("plan", "--base", "./bas", "-m", "average", "a=models/sst2", "b=models/mnli"),
        ("check", "models/sst"),
        ("inspect", "--base", "./bas", "a=models/sst2"),
        ("report", "models/sst"),
        ("evaluate", "--tasks", "models/sst", "a=models/sst2"),
        ("init", "./bas", "models/sst2"),
    ],
)
def test_verbs_say_what_was_meant(here: Path, words: tuple[str, ...]) -> None:
    (here / "models" / "sst2" / "recipe.yaml").touch()
    answer = invoke(*words)
    assert answer.code in (1, 2)
    assert "Did you mean" in answer.err + answer.out
