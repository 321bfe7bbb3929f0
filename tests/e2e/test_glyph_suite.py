"""The glyph suite on made-up pictures: base, expert, folders of images, the command line on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.cli import invoke
from helpers.processes import run_script

GLYPHS = Path(__file__).parents[2] / "benchmarks" / "glyphs"
CLASSES = 4
pytest.importorskip("transformers")


def run(script: str, *words: object) -> None:
    done = run_script(GLYPHS / script, *words)
    assert done.returncode == 0, done.stdout + done.stderr


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise with a bright bar whose row tells the class."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = torch.randint(0, 120, (count, 32, 32), generator=draw, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[4 + 6 * label : 8 + 6 * label] = 250
    return images, labels


@pytest.mark.slow
def test_the_command_line_measures_what_the_suite_does(tmp_path: Path) -> None:
    splits = {}
    for seed, (split, count) in enumerate((("train", 200), ("validation", 20), ("test", 60))):
        splits[f"{split}_images"], splits[f"{split}_labels"] = pictures(count, seed)
    (tmp_path / "data").mkdir()
    save_file(splits, tmp_path / "data" / "digits.safetensors")
    save_file(splits, tmp_path / "pretraining.safetensors")
    run("pretrain.py", "--work", tmp_path, "--steps", 4)
    run("experts.py", "--work", tmp_path, "--task", "digits", "--steps", 25)
    run("export.py", "--work", tmp_path, "--task", "digits")
    expert, base = tmp_path / "experts" / "digits", tmp_path / "base"
    words = ["--tasks", tmp_path / "images" / "tasks.yaml", "--base", base, "--json"]
    answer = invoke("evaluate", *words, "-e", f"digits={expert}")
    assert answer.code == 0, answer.err
    found = {r["checkpoint"]: r["value"] for r in json.loads(answer.out)["results"]}
    told = json.loads((expert / "accuracy.json").read_text())
    assert found["base"] == pytest.approx(told["base"], abs=1 / 60)
    assert found["digits"] == pytest.approx(told["expert"], abs=1 / 60)
    assert told["expert"] > 0.9
