"""Guards adapters of merges whose layers hold several matrices: each is merged for itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eutectic
from eutectic.errors import RecipeError

from .test_compress_before import changes

OUT, IN, RANKS = 48, 40, {"a": 2, "b": 3}
NAME = "model.layers.0.attn.c_attn"


def model(tmp_path: Path, turned: bool) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Write a base of one layer, stored `[in, out]` if turned, and adapters of it."""
    generator = torch.Generator().manual_seed(3)
    (tmp_path / "base").mkdir()
    weight = torch.randn(*((IN, OUT) if turned else (OUT, IN)), generator=generator)
    save_file({f"{NAME}.weight": weight}, tmp_path / "base" / "model.safetensors")
    kind = "gpt2" if turned else "none"
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": kind}))
    paths: dict[str, Any] = {}
    deltas: dict[str, Tensor] = {}
    for name, rank in RANKS.items():
        A = torch.randn(rank, IN, generator=generator)
        B = torch.randn(OUT, rank, generator=generator)
        (tmp_path / name).mkdir()
        key = f"base_model.model.{NAME}"
        tensors = {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
        config["fan_in_fan_out"] = turned
        config["target_modules"] = ["c_attn"]
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        paths[name], deltas[name] = str(tmp_path / name), B.double() @ A.double()
    return str(tmp_path / "base"), paths, deltas


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("post", [None, "svc"])
@pytest.mark.parametrize("method", ["task_arithmetic", "iso_c", "tsv_m", "core_ties", "knots_ties"])
def test_an_adapter_holds_what_the_full_merge_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, post: str | None, turned: bool
) -> None:
    monkeypatch.setattr("eutectic.execution.adapter_factors.PIECE", 1000)  # of 1920 entries
    base, experts, _ = model(tmp_path, turned)
    common: dict[str, Any] = {"base": base, "experts": experts, "method": method, "scale": 0.8}
    common["tensors"] = [{"match": "*", "split": [24, 24]}]
    if post:
        common["post"] = post
    full = eutectic.merge(**common, output=tmp_path / "full")
    thin = eutectic.merge(**common, adapter={}, output=tmp_path / "thin")
    files = (load_file(Path(f) / "model.safetensors") for f in (tmp_path / "full", base))
    new, old = (own[f"{NAME}.weight"].double() for own in files)
    wanted = (new - old).mT if turned else new - old
    torch.testing.assert_close(changes(tmp_path / "thin")[NAME], wanted, rtol=1e-4, atol=2e-6)
    for norm in ("merged", "base", "experts"):
        assert thin.norms[norm] == pytest.approx(full.norms[norm], rel=1e-3)
    told = thin.records[f"{NAME}.weight"]
    if method != "knots_ties":  # whose matrices have rows beyond the adapters' own
        assert told["adapter"]["rank"] == sum(RANKS.values())
    if post:
        assert (
            set(told) == {"[0]", "[1]", "adapter"} == {*full.records[f"{NAME}.weight"], "adapter"}
        )


def test_iso_c_of_each_matrix(tmp_path: Path) -> None:
    base, experts, deltas = model(tmp_path, turned=False)
    eutectic.merge(
        base=base, experts=experts, method="iso_c", scale=1.0, adapter={},
        tensors=[{"match": "*", "split": [24, 24]}], output=tmp_path / "out",
    )  # fmt: skip
    parts: list[Tensor] = []
    for part in sum(deltas.values()).split(24):  # type: ignore[union-attr]
        U, S, Vh = torch.linalg.svd(part, full_matrices=False)
        parts.append(S[:5].mean() * U[:, :5] @ Vh[:5])
    torch.testing.assert_close(
        changes(tmp_path / "out")[NAME], torch.cat(parts), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("method", ["knots_ties", "knots_dare_linear"])
def test_rows_of_more_directions_than_a_layer_has_are_refused_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    ranks = {"a": 9, "b": 12}  # 16 of each third, 48 in all, of 40
    monkeypatch.setattr(f"{__name__}.RANKS", ranks)
    base, experts, _ = model(tmp_path, turned=False)
    thirds = [{"match": "*", "split": [16, 16, 16]}]
    asked: dict[str, Any] = {"base": base, "experts": experts, "tensors": thirds, "adapter": {}}
    with pytest.raises(RecipeError, match=r"more directions .*\(1 layer, such as"):
        eutectic.plan(**asked, method=method)
    held = eutectic.plan(**asked, method="knots_linear").adapter  # whose rows are those of A
    assert held is not None and held["ranks"] == {"21": 1}


def test_dare_that_drops_nothing_keeps_the_rows_of_the_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.RANKS", {"a": 9, "b": 12})
    base, experts, deltas = model(tmp_path, turned=False)
    asked: dict[str, Any] = {"base": base, "experts": experts, "method": "knots_dare_linear"}
    asked |= {"tensors": [{"match": "*", "split": [16, 16, 16]}], "adapter": {}, "scale": 1.0}
    held = eutectic.plan(**asked, parameters={"density": 1}).adapter
    assert held is not None and held["ranks"] == {"21": 1}
    made = eutectic.merge(**asked, parameters={"density": 1}, output=tmp_path / "out")
    assert made.records[f"{NAME}.weight"]["adapter"]["rank"] == 21
    torch.testing.assert_close(
        changes(tmp_path / "out")[NAME], sum(deltas.values()), rtol=1e-4, atol=1e-5
    )
    own = {"a": {"path": experts["a"], "parameters": {"density": 0.9}}, "b": experts["b"]}
    with pytest.raises(RecipeError, match="more directions"):
        eutectic.plan(**{**asked, "experts": own}, parameters={"density": 1})


def test_a_plan_knows_the_rank_of_rows_trimmed_part_by_part(tmp_path: Path) -> None:
    base, experts, _ = model(tmp_path, turned=False)
    asked: dict[str, Any] = {"base": base, "experts": experts, "method": "knots_ties"}
    asked |= {"tensors": [{"match": "*", "split": [24, 24]}], "adapter": {}}
    held = eutectic.plan(**asked).adapter
    made = eutectic.merge(**asked, output=tmp_path / "out").records[f"{NAME}.weight"]["adapter"]
    assert held is not None and held["ranks"] == {str(made["rank"]): 1} == {"10": 1}
