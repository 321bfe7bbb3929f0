"""LoRA folders made by peft as experts: the same merge as of their expanded checkpoints.

Guards scaling, rank patterns, rank-stabilised scaling, `Conv1D`, modules saved in full, heads, and
element-wise as well as matrix methods.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from eutectic.checkpoint.expert_tensors import Expert
from helpers.folders import load
from helpers.models import make_model

pytest.importorskip("peft")

# peft asks transformers for names that newer versions deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LORAS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("bert", {"r": 4, "lora_alpha": 12, "target_modules": ["query", "value"]}),
    "patterns": (
        "bert",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["query", "dense"],
            "rank_pattern": {"layer.1.attention.self.query": 2},
            "alpha_pattern": {"layer.0.attention.self.query": 20},
            "use_rslora": True,
        },
    ),
    "in full": (
        "bert",
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["key"],
            "modules_to_save": ["transform"],
        },
    ),
}
CONV1D: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 9,
    "target_modules": ["c_attn", "c_proj"],
    "fan_in_fan_out": True,
}


@pytest.fixture(scope="module")
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Path], dict[str, Path]]:
    """A base, three adapters of it, and the checkpoints that they expand to."""
    kind, settings = request.param
    folder = tmp_path_factory.mktemp("family")
    from peft import LoraConfig, get_peft_model

    base = folder / "base"
    make_model(kind).save_pretrained(base)
    adapters = {f"e{i}": folder / f"adapter{i}" for i in range(3)}
    full = {f"e{i}": folder / f"full{i}" for i in range(3)}
    for i, name in enumerate(adapters):
        model: Any = get_peft_model(make_model(kind), LoraConfig(**settings))
        generator = torch.Generator().manual_seed(50 + i)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.2 * noise)
        model.save_pretrained(adapters[name])
        model.merge_and_unload().save_pretrained(full[name])
    return base, adapters, full


Family = tuple[Path, dict[str, Path], dict[str, Path]]


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "iso_c", "tsv_m"])
@pytest.mark.parametrize("family", LORAS.values(), ids=LORAS, indirect=True)
def test_an_adapter_is_as_good_as_its_checkpoint(
    family: Family, method: str, tmp_path: Path
) -> None:
    _assert_same_merge(*family, method, tmp_path)


@pytest.mark.parametrize("method", ["task_arithmetic", "iso_c", "tsv_m"])
@pytest.mark.parametrize("family", [("gpt2", CONV1D)], ids=["conv1d"], indirect=True)
def test_an_adapter_of_conv1d_layers(family: Family, method: str, tmp_path: Path) -> None:
    _assert_same_merge(*family, method, tmp_path)


@pytest.mark.parametrize("method", ["iso_c", "tsv_m"])
@pytest.mark.parametrize("family", [LORAS["patterns"]], ids=["patterns"], indirect=True)
def test_thin_factors_are_not_expanded(
    family: Family, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters, full = family
    expanded: list[str] = []
    delta = Expert.delta

    def noted(self: Expert, name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        expanded.append(name)
        return delta(self, name, *args, **kwargs)

    monkeypatch.setattr(Expert, "delta", noted)
    # A plan reads a few windows of every change, which are the whole of so small ones.
    monkeypatch.setattr("eutectic.planning.notes.kinship", lambda *_: [])
    eutectic.merge(base=base, experts=adapters, method=method, output=tmp_path / "thin")
    split = [{"match": "*", "split": 2}]
    parts = tmp_path / "parts"
    eutectic.merge(base=base, experts=adapters, method=method, tensors=split, output=parts)
    assert not [name for name in expanded if name.endswith("weight")]
    monkeypatch.undo()
    whole = tmp_path / "whole"
    eutectic.merge(base=base, experts=full, method=method, tensors=split, output=whole)
    ours, theirs = load(parts), load(whole)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("family", [LORAS["plain"]], ids=["plain"], indirect=True)
def test_adapters_and_checkpoints_mix(family: Family, tmp_path: Path) -> None:
    base, adapters, full = family
    _assert_same_merge(base, {**adapters, "e1": full["e1"]}, full, "iso_c", tmp_path)


@pytest.mark.parametrize("family", [LORAS["plain"]], ids=["plain"], indirect=True)
def test_an_adapter_that_acts_on_a_head_gives_the_head_in_full(
    family: Family, tmp_path: Path
) -> None:
    base, adapters, full = family
    rules = [{"match": "*layer.1.attention.self.query.weight", "treatment": "head"}]
    output = tmp_path / "merged"
    eutectic.merge(base=base, experts=adapters, method="average", tensors=rules, output=output)
    name = "bert.encoder.layer.1.attention.self.query.weight"
    for expert in adapters:
        own = load(output / "experts" / expert)
        torch.testing.assert_close(own[name], load(full[expert])[name])
    assert torch.equal(load(output)[name], load(base)[name])


def _assert_same_merge(
    base: Path, adapters: dict[str, Path], full: dict[str, Path], method: str, folder: Path
) -> None:
    for output, experts in (("by-adapter", adapters), ("by-checkpoint", full)):
        eutectic.merge(base=base, experts=experts, method=method, scale=0.6, output=folder / output)
    ours, theirs = load(folder / "by-adapter"), load(folder / "by-checkpoint")
    assert set(ours) == set(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-6, msg=name)
