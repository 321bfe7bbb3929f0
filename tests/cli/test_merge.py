"""Guards `eutectic merge`: by recipe, by words, by both; what comes out and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eutectic.cli.merge import adapter_rows

RECIPE = """\
base: ./base
experts: {a: ./a, b: {path: ./b, weight: 3}}
method: average
"""
BY_WORDS = ("merge", "--base", "base", "-m", "average", "a=a", "b=b")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def expected(models: Path, weights: tuple[float, float], scale: float = 1.0):
    base, a, b = (tensors(models / name) for name in ("base", "a", "b"))
    total = sum(weights)
    return {
        key: w0 + scale * (weights[0] * (a[key] - w0) + weights[1] * (b[key] - w0)) / total
        for key, w0 in base.items()
    }


def check(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    got = tensors(folder)
    assert got.keys() == wanted.keys()
    assert all(torch.allclose(got[key], wanted[key], atol=1e-6) for key in wanted)


def test_by_words(eutectic, models):
    result = eutectic(*BY_WORDS, "-o", "out")
    assert result.exit_code == 0, result.output
    assert "written out" in result.stdout
    check(models / "out", expected(models, (1, 1)))
    assert not (models / "out.partial").exists()


def test_by_recipe(eutectic, models):
    (models / "recipe.yaml").write_text(RECIPE)
    assert eutectic("merge", "recipe.yaml", "-o", "out").exit_code == 0
    check(models / "out", expected(models, (1, 3)))


def test_words_win_over_the_recipe(eutectic, models):
    (models / "recipe.yaml").write_text(RECIPE)
    result = eutectic(
        "merge", "recipe.yaml", "--scale", "0.5", "--set", "dtype=float16", "-o", "out"
    )
    assert result.exit_code == 0, result.output
    got, wanted = tensors(models / "out"), expected(models, (1, 3), 0.5)
    assert all(value.dtype == torch.float16 for value in got.values())
    assert all(torch.allclose(got[k].float(), wanted[k], atol=2e-3) for k in wanted)


def test_weights_and_parameters(eutectic, models):
    result = eutectic(
        "merge", "--base", "base", "-m", "linear", "-w", "a=0.25", "-w", "b=0.5",
        "-p", "normalize=false", "a=a", "b=b", "-o", "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    a, b = tensors(models / "a"), tensors(models / "b")
    check(models / "out", {key: 0.25 * a[key] + 0.5 * b[key] for key in a})


def test_json(eutectic, models):
    result = eutectic(*BY_WORDS, "-o", "out", "--json")
    report = json.loads(result.stdout)
    assert report["method"] == "average" and report["output"] == "out"
    assert sum(report["tensors"].values()) == 10


@pytest.mark.slow
def test_in_a_process(models):
    command = [sys.executable, "-m", "eutectic.cli.main", *BY_WORDS, "-o", "out", "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert json.loads(result.stdout)["resumed"] is False


def test_an_output_in_use_is_refused(eutectic, models):
    (models / "out").mkdir()
    (models / "out" / "mine.txt").write_text("keep")
    result = eutectic(*BY_WORDS, "-o", "out")
    assert result.exit_code == 2
    assert "out is not empty" in result.stderr
    assert [p.name for p in (models / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "nothing to merge"),
        (("a=a",), 2, "without a recipe, --base and --method must be given"),
        (("--base", "base", "a=a"), 2, "without a recipe, --method must be given"),
        (("nowhere.yaml",), 2, "nowhere.yaml: no such file."),
        ((*BY_WORDS[1:], "-p", "density"), 2, "--param 'density' must have the form name=value"),
        ((*BY_WORDS[1:], "-p", "density=1"), 2, "unknown parameter 'density'"),
        ((*BY_WORDS[1:], "-p", "x=[1"), 2, "'[1' is not a YAML value"),
        (("a", "other/a", "--base", "base", "-m", "iso_c"), 2, "expert 'a' is given twice"),
        ((*BY_WORDS[1:], "-w", "c=1"), 2, "--weight names 'c', which is not an expert"),
        ((*BY_WORDS[1:], "-w", "c=1"), 2, "Experts on the command line: a, b."),
        ((*BY_WORDS[1:], "-w", "a=lots"), 2, "--weight a: should be a valid number"),
        ((*BY_WORDS[1:], "-w", "a=1", "-w", "a=2"), 2, "--weight 'a' is given twice"),
        ((*BY_WORDS[1:], "-w", "a=1", "-w", "b=-1"), 2, "the experts' weights sum to zero"),
        ((*BY_WORDS[1:], "--set", "dtyp=float16"), 2, "Did you mean 'dtype'?"),
        ((*BY_WORDS[1:], "--set", "dtype=float8"), 2, "dtype: should be 'float16', 'bfloat16'"),
        ((*BY_WORDS[1:], "a=b"), 2, "expert 'a' is given twice"),
        ((*BY_WORDS[1:], "c=./nowhere"), 2, "experts.c.path: no such file: ./nowhere"),
        ((*BY_WORDS[1:], "--memory", "much"), 2, "'much' is not a size in bytes"),
        ((*BY_WORDS[1:], "--memory", "1kB"), 2, "the limit is 1 kB"),
        ((*BY_WORDS[1:], "--threads", "0"), 2, "--threads"),
        ((*BY_WORDS[1:], "--scale", "big"), 2, "--scale"),
        (
            ("--base", "base", "-m", "slerp", "a=a", "b=b", "c=a"),
            2,
            "takes exactly 2 experts, got 3",
        ),
        (("--base", "./nobase", "-m", "average", "a=a"), 2, "base: no such file: ./nobase"),
    ],
)
def test_refusals_in_words(eutectic, models, words, code, message):
    result = eutectic("merge", "-o", "out", *words)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 6
    assert not (models / "out").exists()


def test_work_that_fails_says_where(eutectic, models):
    held = tensors(models / "b")
    held["model.layers.1.mlp.down_proj.weight"][2, 3] = float("nan")
    from safetensors.torch import save_file

    save_file(held, models / "b" / "model.safetensors", metadata={"format": "pt"})
    result = eutectic(*BY_WORDS, "-o", "out")
    assert result.exit_code == 1
    assert "model.layers.1.mlp.down_proj.weight" in result.stderr and "'b'" in result.stderr
    assert not (models / "out").exists()


def test_what_an_adapter_lost_is_told_by_what_it_is_a_share_of():
    """Means and worst layers, of the experts' changes, of the merge and of what it adds."""
    layer = {"rank": 4, "changed": True, "lost_energy": 0.02}
    records = {
        "a": {"adapter": layer},
        "b": {"adapter": layer | {"rank": 8, "lost_energy": 0.04}},
        "norm": {"adapter": {"changed": True}},
        "c": {"adapter": layer | {"changed": False, "lost_energy": 0.9}},
        "copied": {},
    }
    assert adapter_rows(records) == [
        ("adapter", "2 layers of rank 4 to 8, 1 other tensor changed"),
        ("lost energy", "of the merged change: 3 % on average, 4 % at most (b)"),
    ]
    before = {"a": {"adapter": layer | {"lost_before": 0.5, "lost_energy": 0.0}}}
    assert adapter_rows(before)[1:] == [
        ("lost energy", "of the experts' changes: 50 % on average, 50 % at most (a)")
    ]
    shift = {"a": {"adapter": layer | {"lost_shift": 0.0}}}
    assert adapter_rows(shift)[1:] == [
        ("lost outputs", "of the energy that is added to them: nothing"),
        ("lost energy", "of the merged change: 2 % on average, 2 % at most (a)"),
    ]
    assert adapter_rows({"copied": {}}) == []
