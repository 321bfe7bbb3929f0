"""`scale: norm` makes the change as large as the experts'; language models are told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from eutectic.errors import NumericalError
from eutectic.tuning.norm_scale import norm_scale
from helpers.cli import invoke
from helpers.folders import Tensors, digests, load, make_base, make_expert
from helpers.merging import save_inputs

BASE = make_base(width=24)
SIZES = {"a": 0.1, "b": 0.3, "c": 0.2}
EXPERTS = {n: make_expert(BASE, seed, size) for seed, (n, size) in enumerate(SIZES.items(), 1)}


def change(state: Tensors, names: list[str]) -> float:
    """Return ‖Δ‖ over some tensors."""
    return float(torch.cat([(state[n] - BASE[n]).double().flatten() for n in names]).norm())


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv_m", "iso_c", "average", "ties"])
def test_the_change_is_as_large_as_the_experts(method: str, tmp_path: Path) -> None:
    inputs = save_inputs(tmp_path, BASE, EXPERTS)
    report = eutectic.merge(**inputs, method=method, scale="norm", output=tmp_path / "out")
    names = [n for n, w in BASE.items() if w.is_floating_point()]
    mean = sum(change(state, names) for state in EXPERTS.values()) / 3
    assert change(load(tmp_path / "out"), names) == pytest.approx(mean, rel=1e-4)
    note = next(n for n in report.note_records if n.kind == "norm_scale")
    assert note.numbers["scale"] == report.scale
    again = eutectic.merge(**inputs, method=method, scale=report.scale, output=tmp_path / "again")
    assert again.scale == report.scale
    assert (
        digests(tmp_path / "out")["model.safetensors"]
        == (digests(tmp_path / "again")["model.safetensors"])
    )


def test_a_rule_keeps_its_own_scale(tmp_path: Path) -> None:
    inputs = save_inputs(tmp_path, BASE, EXPERTS)
    rules = [{"match": "embed*", "scale": 0.0}]
    eutectic.merge(
        **inputs, method="task_arithmetic", scale={"search": "norm"}, tensors=rules,
        output=tmp_path / "out",
    )  # fmt: skip
    names = [n for n, w in BASE.items() if w.is_floating_point() and not n.startswith("embed")]
    mean = sum(change(state, names) for state in EXPERTS.values()) / 3
    merged = load(tmp_path / "out")
    assert change(merged, names) == pytest.approx(mean, rel=1e-4)
    assert torch.equal(merged["embed_tokens.weight"], BASE["embed_tokens.weight"])


def test_one_expert_is_itself() -> None:
    assert norm_scale(4.0, {"a": 4.0}) == 1.0
    assert norm_scale(4.0, {"a": 4.0, "b": 0.0}) == 1.0
    for merged, experts in ((0.0, {"a": 1.0}), (1.0, {"a": 0.0}), (float("nan"), {"a": 1.0})):
        with pytest.raises(NumericalError, match="no norm tells a scale"):
            norm_scale(merged, experts)


def test_the_command(tmp_path: Path) -> None:
    inputs = save_inputs(tmp_path, BASE, EXPERTS)
    words: list[Any] = [f"{name}={path}" for name, path in inputs["experts"].items()]
    words = ["--base", inputs["base"], "-m", "tsv_m", *words]
    merged = invoke("merge", *words, "--scale", "norm", "-o", tmp_path / "out")
    assert merged.code == 0, merged.err
    assert "as large as the experts' own are on average (the default is 1)" in merged.out
    tuned = invoke("tune", *words, "--search", "norm", "--json")
    made = json.loads((tmp_path / "out" / "eutectic.json").read_text())
    assert json.loads(tuned.out)["scale"] == made["scale"]
    assert "α = " in invoke("tune", *words, "--search", "norm").out
    refused = invoke("tune", *words, "--search", "norm", "--points", "5")
    assert refused.code == 2 and "takes no --points" in refused.err


@pytest.mark.parametrize(
    ("architecture", "scale", "told"),
    [
        ("LlamaForCausalLM", None, True),
        ("LlamaForCausalLM", 1.0, False),
        ("T5ForConditionalGeneration", None, True),
        ("ViTForImageClassification", None, False),
    ],
)
def test_language_models_are_told_of_large_changes_at_default_scales(
    architecture: str, scale: float | None, told: bool, tmp_path: Path
) -> None:
    config = {"model_type": "toy", "architectures": [architecture]}
    inputs = save_inputs(tmp_path, BASE, EXPERTS, config)
    report = eutectic.merge(
        **inputs, method="task_arithmetic", scale=scale, output=tmp_path / "out"
    )
    notes = [n for n in report.note_records if n.kind == "default_for_pictures"]
    assert bool(notes) is told
    if told:
        named = eutectic.merge(
            **inputs, method="task_arithmetic", scale="norm", output=tmp_path / "norm"
        )
        assert notes[0].numbers["norm"] == pytest.approx(named.scale, rel=1e-3)
        assert "--scale norm" in notes[0].text
    quiet = eutectic.merge(**inputs, method="average", output=tmp_path / "mean")
    assert not [n for n in quiet.note_records if n.kind == "default_for_pictures"]
