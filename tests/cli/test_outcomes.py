"""`eutectic merge` says in a few lines how the systems of matching were solved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from eutectic.cli.merge import summary
from helpers.cli import invoke
from helpers.folders import save


def test_a_merge_by_matching_prints_what_became_of_its_systems(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6))
    base = {k: v.clone() for k, v in model.state_dict().items()}
    words: list[Any] = ["--base", save(tmp_path / "base", base), "-m", "mats"]
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed + 1)
        model.load_state_dict({k: v + 0.1 * torch.randn_like(v) for k, v in base.items()})
        words += [f"{name}={save(tmp_path / name, model.state_dict())}"]
        stats = tmp_path / f"{name}.stats.safetensors"
        eutectic.collect(model, [torch.randn(40, 6)], stats)
        words += ["-s", f"{name}={stats}"]
    answer = invoke("merge", *words, "-p", "iterations=2", "-o", tmp_path / "merged")
    assert answer.code == 0, answer.err
    assert "2 solved by conjugate gradients: 2 iteration limit" in answer.out
    assert "iterations 2 worst" in answer.out
    assert "worst residual" in answer.out and "weight" in answer.out
    assert "2 took 'average': operator 'gram' is for matrices" in answer.out
    records = json.loads((tmp_path / "merged" / "eutectic.json").read_text())["records"]
    curves = [r["matrix"]["residuals"] for r in records.values() if "residuals" in r["matrix"]]
    assert [len(curve) for curve in curves] == [3, 3]
    assert all(curve[2] < curve[0] for curve in curves)


def test_residuals_that_are_not_finite_are_null_in_json(tmp_path: Path) -> None:
    weight = {"weight": torch.ones(3, 4)}
    spoilt = {"weight": torch.full((3, 4), float("nan"))}
    words: list[Any] = ["--base", save(tmp_path / "base", weight), "-m", "mats"]
    words += [f"a={save(tmp_path / 'a', spoilt)}", f"b={save(tmp_path / 'b', weight)}"]
    words += ["-p", "operator=identity", "--set", "nonfinite=allow", "-o"]

    def strict(text: str) -> Any:
        return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    answer = invoke("merge", *words, tmp_path / "merged", "--json")
    assert answer.code == 0, answer.err
    written = strict((tmp_path / "merged" / "eutectic.json").read_text())
    for report in (strict(answer.out), written):
        record = report["records"]["weight"]["matrix"]
        assert (record["status"], record["residuals"]) == ("non_finite", [None])
    assert "not finite at weight" in invoke("merge", *words, tmp_path / "again").out


def test_every_kind_of_shortfall_is_told() -> None:
    records = {
        "a": {"matrix": {"status": "converged", "iterations": 3, "residuals": [1.0, 1e-6]}},
        "b": {"[0]": {"status": "breakdown", "iterations": 0, "residuals": [None]}},
        "c": {"matrix": {"ridge": 1e-5, "ridge_escalated": True, "dead_inputs": 1}},
        "d": {"matrix": {"rest": "average", "reason": "every Gram is zero"}},
        "e": {"matrix": {"rank": 4, "directions": [4, 2], "short": ["x"]}},
    }
    text = "\n".join(f"{label}: {line}" for label, line in summary(records))
    assert "1 converged, 1 breakdown" in text
    assert "worst residual: not finite at b[0]" in text
    assert "1 Gram took a ridge, up to 1.0e-05 at c" in text
    assert "1 took 'average': every Gram is zero" in text
    assert "such as e" in text
    assert summary({}) == []


def test_a_layers_factor_is_no_system():
    assert summary({"w": {"matrix": {"rank": 3}, "factor": 1.25}}) == []
