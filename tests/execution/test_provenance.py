"""Merges that start from a checkpoint, and what the provenance of a merge says of its sources.

Guards: `init: path` means the same from any folder, however the recipe is passed on;
`eutectic.json` names everything that the numbers came from, and no path of this machine.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import eutectic
from helpers.folders import load, save

RECIPE = """\
base: ./base
experts:
  a: {path: ./a, statistics: ./a.stats.safetensors}
  b: {path: ./b, statistics: ./b.stats.safetensors}
method: mats
parameters: {init: ./start, iterations: 0, rest: init}
scale: 1.0
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Save a base, two experts with statistics, a checkpoint to start from, and the recipe."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    base = {name: w.clone() for name, w in model.state_dict().items()}
    save(tmp_path / "base", base)
    for name in "ab":
        own = {k: w + 0.1 * torch.randn_like(w) for k, w in base.items()}
        save(tmp_path / name, own)
        model.load_state_dict(own)
        eutectic.collect(model, [torch.randn(30, 6)], tmp_path / f"{name}.stats.safetensors")
    start = save(tmp_path / "start", {k: w + 0.05 for k, w in base.items()})
    (start / "README.md").write_text("---\nlicense: mit\n---\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("options", [{}, {"seed": 1}])
def test_without_steps_the_initial_checkpoint_comes_back(
    options: dict[str, int], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    eutectic.merge("../recipe.yaml", output="merged", **options)
    merged, start = load(elsewhere / "merged"), load(tmp_path / "start")
    assert merged.keys() == start.keys()
    for name, w in start.items():
        torch.testing.assert_close(merged[name], w, rtol=0, atol=1e-6)


def test_the_provenance_names_the_data_and_the_initial_checkpoint(
    recipe: Path, tmp_path: Path
) -> None:
    eutectic.merge(recipe, output=tmp_path / "merged")
    text = (tmp_path / "merged" / "eutectic.json").read_text()
    made = json.loads(text)
    for name in "ab":
        statistics = eutectic.load_statistics(tmp_path / f"{name}.stats.safetensors")
        assert made["parents"][name]["statistics"] == statistics.provenance["data"]
    assert made["parents"]["a"]["statistics"] != made["parents"]["b"]["statistics"]
    assert "statistics" not in made["parents"]["base"]
    initial = made["initial"]
    assert (initial["name"], initial["licence"]) == ("start", "mit")
    fingerprints = {initial["fingerprint"], *(p["fingerprint"] for p in made["parents"].values())}
    assert len(fingerprints) == 4
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"| initial | start | mit | `{initial['fingerprint'][:16]}` |" in card
    assert "Merged from 2 experts" in card
    assert str(tmp_path) not in text + card


def test_without_them_the_provenance_does_not_mention_them(recipe: Path, tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in "ab"}
    eutectic.merge(
        base=tmp_path / "base", experts=paths, method="average", output=tmp_path / "merged"
    )
    made = json.loads((tmp_path / "merged" / "eutectic.json").read_text())
    assert "initial" not in made
    assert all(p.keys() == {"name", "fingerprint", "licence"} for p in made["parents"].values())
