"""`eutectic calibrate` on checkpoints with tokenizers and image processors, and files of rows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file

from evaluation import world
from helpers.cli import invoke
from helpers.folders import digests
from helpers.processes import start_cli


def perturbed(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embeddings" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged encoder, two experts, and rows of which some have labels that nobody reads."""
    folder = tmp_path_factory.mktemp("world")
    for i, name in enumerate(("merged", "a", "b")):
        world.save(perturbed(world.make("encoder"), i), folder / name)
    for i, name in enumerate("ab"):
        rows = [{"text": text, "label": "anything"} for text in world.sentences(40, i)]
        world.jsonl(folder / f"{name}.jsonl", rows)
    return folder


def words(folder: Path, output: Path, *more: object) -> list[object]:
    named = [f"{name}={folder / name}" for name in "ab"]
    data = [w for name in "ab" for w in ("-d", f"{name}={folder / name}.jsonl")]
    return ["calibrate", folder / "merged", *named, *data, "-o", output, *more]


def test_a_merged_model_and_rows_of_texts(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings = ("--samples", 32, "--holdout", 0.25, "--seed", 3, "--ridge", 0.01, "--json")
    report = json.loads(invoke(*words(folder, output, *settings)).out)
    assert report["output"] == str(output) and report["held_out"]
    assert report["data"] == {name: {"examples": 24, "held_out": 8} for name in "ab"}
    assert report["calibrated"] == {"biases": 13, "matrices": 13, "norms": 10}
    record = json.loads((output / "eutectic.json").read_text())["calibration"]
    assert record["settings"]["ridge"] == 0.01 and record["layers"] == report["layers"]
    old, new = (load_file(f / "model.safetensors") for f in (folder / "merged", output))
    # The norm above the tables is the same in all of them.
    assert sum(not torch.equal(old[n], new[n]) for n in old) == 34

    again = tmp_path / "again"
    invoke(*words(folder, again, "--samples", 32, "--holdout", 0.25, "--seed", 3, "--ridge", 0.01))
    assert digests(again) == digests(output)


def test_a_person_reads_a_table(folder: Path, tmp_path: Path) -> None:
    shown = invoke(*words(folder, tmp_path / "out", "--sites", "norms", "--samples", 8)).out
    assert "calibrated 10 norms" in shown and "8 inputs" in shown
    assert "embeddings.LayerNorm.weight" in shown and "written" in shown


def test_pictures(tmp_path: Path) -> None:
    for i, name in enumerate(("merged", "a")):
        world.save(perturbed(world.make("vit"), i), tmp_path / name)
    world.images(tmp_path / "pictures", 9)
    command = ["calibrate", tmp_path / "merged", f"a={tmp_path / 'a'}"]
    command += ["-d", f"a={tmp_path / 'pictures'}", "-o", tmp_path / "out", "--json"]
    report = json.loads(invoke(*command).out)
    assert report["data"] == {"a": {"examples": 9, "held_out": 0}}
    assert report["calibrated"]["convolutions"] == 1
    assert report["left"] == {"a head": ["classifier.weight"]}


def test_a_killed_process_is_continued_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    invoke(*words(folder, tmp_path / "whole"))
    output, work = tmp_path / "out", tmp_path / "out.partial"
    process = start_cli(*words(folder, output))
    while process.poll() is None and len(list(work.glob("layer-*"))) < 5:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    finished = len(list(work.glob("layer-*")))
    assert finished >= 5 and not output.exists()
    report = json.loads(invoke(*words(folder, output, "--json")).out)
    assert report["resumed"] and digests(output) == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--sites", "weights"], "sites are matrices, biases, norms, convolutions; got 'weights'"),
        (["--anchor-scale", "2"], "needs the base"),
        (["--split", "train"], "without splits"),
        (["-d", "c=x.jsonl"], "data of 'c', which is no expert"),
        (["--layers", "x*"], "no layer to calibrate"),
        (["--text-column", "sentence"], "--text-column"),
    ],
)
def test_wrong_requests(more: list[str], said: str, folder: Path, tmp_path: Path) -> None:
    answer = invoke(*words(folder, tmp_path / "out", *more))
    assert answer.code == 2 and said in answer.err
    assert not (tmp_path / "out").exists()
