"""How large a merged change is against its experts', and what that warns of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eutectic
from eutectic.execution import norms
from eutectic.execution.norms import bound
from helpers.cli import invoke
from helpers.folders import load, save

SHAPES = {"embed.weight": (30, 8), "a.weight": (8, 6), "qkv.weight": (12, 6), "bias": (8,)}
STACK = "experts.up_proj"


def tensors(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {**SHAPES, STACK: (2, 6, 4)}
    return {name: size * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def moved(base: dict[str, Tensor], seed: int, size: float) -> dict[str, Tensor]:
    return {name: base[name] + d for name, d in tensors(seed, size).items()}


def world(folder: Path, sizes: dict[str, float]) -> dict[str, Any]:
    base = tensors(0)
    save(folder / "base", base)
    for seed, (name, size) in enumerate(sizes.items(), 1):
        save(folder / name, moved(base, seed, size))
    return {"base": str(folder / "base"), "experts": {n: str(folder / n) for n in sizes}}


def oracle(folder: Path, output: Path, names: list[str], only: str = "") -> tuple[float, float]:
    """Return ‖W − W₀‖ of the written file and the experts' mean ‖Δ_t‖."""
    base = load(folder / "base")

    def norm(other: dict[str, Tensor]) -> float:
        parts = [(other[n].double() - w.double()).square().sum() for n, w in base.items()]
        return math.sqrt(sum(float(x) for n, x in zip(base, parts, strict=True) if only in n))

    return norm(load(output)), sum(norm(load(folder / n)) for n in names) / len(names)


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "average", "scale": 1.0},  # weights of the experts alone, without the base's
        {"method": "average", "scale": 0.5},
        {"method": "linear", "scale": 1.0, "parameters": {"normalize": False}},
        {"method": "task_arithmetic", "scale": 0.7},
        {"method": "ties", "scale": 1.0},
        {"method": "iso_c", "scale": 1.2, "tensors": [{"match": "qkv*", "split": 3}]},
        {"method": "iso_c", "scale": 1.2, "tensors": [{"match": "a.*", "scale": 0.1}]},
        {"method": "esm", "fallback": "allow", "tensors": [{"match": "bias", "treatment": "copy"}]},
    ],
    ids=lambda r: f"{r['method']}",
)
def test_the_ratio_is_that_of_the_files(recipe: dict[str, Any], tmp_path: Path) -> None:
    inputs = world(tmp_path, {"x": 0.1, "y": 0.3})
    report = eutectic.merge({**inputs, **recipe}, output=tmp_path / "out")
    skipped = {"bias"} if recipe["method"] == "esm" else set[str]()
    base = load(tmp_path / "base")
    held = [n for n in base if n not in skipped]

    def norm(other: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float((other[n] - base[n]).double().square().sum()) for n in held))

    mean = sum(norm(load(tmp_path / n)) for n in "xy") / 2
    assert report.norms["merged"] == pytest.approx(norm(load(tmp_path / "out")), rel=2e-3)
    assert report.norms["ratio"] == pytest.approx(norm(load(tmp_path / "out")) / mean, rel=2e-3)
    assert report.norms["experts"]["x"] == pytest.approx(norm(load(tmp_path / "x")), rel=2e-3)
    if recipe["method"] not in ("linear",):
        assert not any(note.kind == "exploded" for note in report.note_records)


def test_an_explosion_is_told_everywhere(tmp_path: Path) -> None:
    inputs = world(tmp_path, {"x": 0.1, "y": 0.1})
    words = ["merge", "--base", inputs["base"], "-m", "task_arithmetic", "--scale", "4"]
    words += [f"{n}={p}" for n, p in inputs["experts"].items()]
    shown = invoke(*words, "-o", tmp_path / "out")
    told = json.loads(invoke(*words, "-o", tmp_path / "json", "--json").out)
    whole, mean = oracle(tmp_path, tmp_path / "out", ["x", "y"])
    assert told["norms"]["ratio"] == pytest.approx(whole / mean, rel=2e-3)
    assert told["norms"]["above"] == told["norms"]["matrices"] == 4  # a bias is none
    one, own = oracle(tmp_path, tmp_path / "out", ["x", "y"], "a.weight")
    assert told["norms"]["largest"]["a.weight"] == pytest.approx(one / own, rel=2e-3)
    assert shown.code == 0 and f"change is {whole / mean:.3g} times" in shown.err
    assert "more than 3 times in 4 of 4 matrices" in shown.err.replace("\n", " ")
    assert "more than 3 times in 4 of 4" in (tmp_path / "out" / "README.md").read_text()
    made = json.loads((tmp_path / "out" / "eutectic.json").read_text())
    assert made["norms"] == told["norms"]
    assert {"exploded"} == {n["kind"] for n in told["note_records"] if n["level"] == "warning"}


def test_one_matrix_of_a_stack_or_a_fused_one_is_named(tmp_path: Path) -> None:
    base, experts = tensors(0), {n: tensors(0) for n in "xy"}
    for name, own in experts.items():
        sign = 1.0 if name == "x" else -1.0
        own[STACK][0] += 0.1 * sign  # cancels
        own[STACK][1] += 0.1
        own["qkv.weight"][4:8] += 0.1
    save(tmp_path / "base", base)
    paths = {n: str(save(tmp_path / n, own)) for n, own in experts.items()}
    report = eutectic.merge(
        base=str(tmp_path / "base"), experts=paths, method="iso_c", scale=3.0,
        tensors=[{"match": "qkv*", "split": 3}], output=tmp_path / "out",
    )  # fmt: skip
    # Rank one, twice the same: Iso-C gives 2Δ, times 3.
    assert report.norms["largest"] == {"qkv.weight[1]": 6.0, f"{STACK}[1]": 6.0}


def test_thin_factors_have_the_norms_of_their_products() -> None:
    g = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(7, 2, generator=g), torch.randn(2, 5, generator=g)) for _ in range(2)]
    from eutectic.linalg.lowrank import LowRankStack

    stack = LowRankStack(*(tuple(side) for side in zip(*pairs, strict=True)))
    thin = norms.squares_of(stack, None, torch.zeros(7, 5))
    whole = norms.squares_of(stack.dense(), None, torch.zeros(7, 5))
    assert thin == pytest.approx(whole)


def test_many_experts_may_add_up_to_the_root_of_their_number() -> None:
    assert bound(2) == bound(9) == 3 and bound(16) == 4


def test_long_tensors_are_measured_on_parts_of_their_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "SAMPLE", 16)
    inputs = world(tmp_path, {"x": 0.1, "y": 0.1})
    report = eutectic.merge(**inputs, method="average", output=tmp_path / "out")
    whole, mean = oracle(tmp_path, tmp_path / "out", ["x", "y"])
    assert report.norms["ratio"] == pytest.approx(whole / mean, rel=0.3)
    assert report.norms["experts"]["x"] == pytest.approx(mean, rel=0.3)


def test_a_resumed_run_reports_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eutectic.execution import output_folder

    inputs = world(tmp_path, {"x": 0.1, "y": 0.1})
    request = {**inputs, "method": "iso_c", "scale": 9.0}
    wanted = eutectic.merge(request, output=tmp_path / "calm")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            eutectic.merge(request, output=tmp_path / "out")
    monkeypatch.setattr("eutectic.execution.tasks._run", killed)  # nothing is merged again
    report = eutectic.merge(request, output=tmp_path / "out")
    assert report.resumed and report.norms == wanted.norms and report.norms["above"]
    assert report.notes == wanted.notes
    assert (tmp_path / "out/eutectic.json").read_bytes() == (
        tmp_path / "calm/eutectic.json"
    ).read_bytes()


def test_experts_that_are_no_kin(tmp_path: Path) -> None:
    inputs = world(tmp_path, {"x": 0.01, "y": 0.01, "far": 0.2, "other": 1.5})
    report = eutectic.merge(**inputs, method="average", output=tmp_path / "out")
    found = {n.subject[0]: n for n in report.note_records if n.kind == "unrelated"}
    assert found.keys() == {"far", "other"}  # 20 times its kin, and beyond the base itself
    assert found["far"].numbers["kin"] == pytest.approx(20, rel=0.2)
    assert found["other"].numbers["share"] == pytest.approx(1.5, rel=0.2)
    assert found["far"].level == "warning" and "fine-tuned from this one?" in found["far"].text


def test_the_same_expert_twice_the_base_and_a_scale_far_out(tmp_path: Path) -> None:
    inputs = world(tmp_path, {"x": 0.1, "y": 0.1})
    again = save(tmp_path / "again", load(tmp_path / "x"))
    experts = {**inputs["experts"], "z": str(again), "w": inputs["base"]}
    words = ["--base", inputs["base"], "-m", "iso_c", *(f"{n}={p}" for n, p in experts.items())]
    for scale, warned in (("20", True), ("1.5", False), ("0.001", True), ("-1", False)):
        shown = invoke("plan", *words, "--scale", scale, "--json")
        kinds = {n["kind"]: n for n in json.loads(shown.out)["note_records"]}
        assert ("scale_far_out" in kinds) == warned
        assert kinds["same_expert"]["subject"] == ["x", "z"]
        assert kinds["same_as_base"]["subject"] == ["w"]
        assert "experts x, z are the same checkpoint" in shown.err
    report = eutectic.merge(
        base=inputs["base"], experts=experts, method="average", output=tmp_path / "out"
    )
    kinds = [n.kind for n in report.note_records if n.level == "warning"]
    assert kinds == ["same_as_base", "same_expert"]  # each told once


def test_experts_that_differ_in_one_tensor_are_two(tmp_path: Path) -> None:
    inputs = world(tmp_path, {"x": 0.1})
    near = load(tmp_path / "x")
    near["bias"] = near["bias"] + 1e-3
    experts = {**inputs["experts"], "near": str(save(tmp_path / "near", near))}
    report = eutectic.merge(
        base=inputs["base"], experts=experts, method="average", output=tmp_path / "out"
    )
    assert not [n for n in report.note_records if n.level == "warning"]


def test_an_inspection_says_what_a_merged_model_has_grown_to(tmp_path: Path) -> None:
    inputs = world(tmp_path, {"x": 0.1, "y": 0.1})
    for name, scale in (("calm", 1.0), ("wild", 5.0)):
        eutectic.merge(**inputs, method="task_arithmetic", scale=scale, output=tmp_path / name)
    merged = {name: tmp_path / name for name in ("calm", "wild")}
    found = eutectic.inspect(**inputs, merged=merged, layers="a.*")
    whole, mean = oracle(tmp_path, tmp_path / "wild", ["x", "y"], "a.weight")
    assert found.summary.merged["wild"].growth == pytest.approx(whole / mean, rel=2e-3)
    assert found.summary.merged["calm"].growth == pytest.approx(whole / mean / 5, rel=2e-3)
    (told,) = (note for note in found.notes if "merged change" in note)
    assert told.startswith("warning: 'wild': ") and "1 of 1 matrices: a.weight" in told
