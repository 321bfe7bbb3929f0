"""`eutectic route`: costs, building from files, inspecting, exporting, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from eutectic.cli.route import route
from eutectic.routed import load_routed
from eutectic.statistics import collect
from routed.world import EXPERTS, bert, counted

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
app = typer.Typer()
app.command()(route)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world, path = bert(), tmp_path_factory.mktemp("route")
    world.merged.save_pretrained(path / "merged")  # type: ignore[operator]
    (path / "merged" / "vocab.txt").write_text("a\n")
    for t, (name, model) in enumerate(world.experts.items()):
        model.save_pretrained(path / name)  # type: ignore[operator]
        collect(model, [world.batch(t, 40, 1)], path / f"{name}.stats.safetensors")
        collect(world.merged, [world.batch(t, 40, 1)], path / f"{name}.merged.safetensors")
    return path


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def request(folder: Path) -> list[Any]:
    words: list[Any] = [folder / "merged", *(f"{n}={folder / n}" for n in EXPERTS)]
    for name in EXPERTS:
        words += ["-s", f"{name}={folder / name}.stats.safetensors"]
        words += ["--router-statistics", f"{name}={folder / name}.merged.safetensors"]
    return words


def test_costs_are_shown_before_building(folder: Path):
    words = [folder / "merged", *(f"{n}={folder / n}" for n in EXPERTS), "--dry-run"]
    result = run(*words, "--rank", 4)
    assert result.exit_code == 0, result.output
    assert "10" in result.output and "multiply-adds" in result.output
    costs = json.loads(run(*words, "--rank", 4, "--json").stdout)["costs"]
    assert costs["layers"] == 10


def test_a_routed_model_is_built_shown_and_exported(folder: Path, tmp_path: Path):
    result = run(*request(folder), "--rank", 4, "-o", tmp_path / "routed")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "routed" / "vocab.txt").exists()
    routed = load_routed(tmp_path / "routed")
    assert routed.routing.router == "discriminant"
    assert bool(torch.isfinite(counted(routed, bert().mixed())).all())
    shown = run(tmp_path / "routed", "--json", "--export", tmp_path / "adapters")
    assert shown.exit_code == 0, shown.output
    report = json.loads(shown.stdout[shown.stdout.index("{") :])
    assert report["experts"] == list(EXPERTS) and len(report["layers"]) == 10
    assert (tmp_path / "adapters" / "experts" / "b" / "adapter_config.json").exists()


def test_requests_that_cannot_be_met_end_with_2(folder: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for words in (
        request(folder),
        [*request(folder), "-o", tmp_path / "full"],
        [*request(folder), "-o", tmp_path / "new", "--router", "cosine"],
        [*request(folder), "-o", tmp_path / "new", "--router-data", "a=x.jsonl"],
        [*request(folder)[:-4], "-o", tmp_path / "new"],
        [folder / "merged", "oops", "-o", tmp_path / "new"],
    ):
        assert run(*words).exit_code == 2, words
    assert run(folder / "merged").exit_code == 1
    assert not (tmp_path / "new").exists()
