"""Whose statistics are these: refused when another checkpoint's, without false alarms.

And packed in-projections whose query, key and value saw different inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eutectic
from eutectic.errors import RecipeError
from eutectic.methods import merge_matrices
from eutectic.types import LayerStatistics
from helpers.cli import invoke
from helpers.folders import load, save, save_sharded
from helpers.models import make_model, perturb

GENERATOR = torch.Generator().manual_seed(3)
BATCHES = [torch.randn(24, 6, generator=GENERATOR)]


class Net(nn.Module):
    """Two layers; `tied` stores the second under a further name."""

    def __init__(self, seed: int, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        if tied:
            self.lm_head = nn.Linear(8, 6, bias=False)
            self.lm_head.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def near(model: nn.Module, seed: int, size: float = 0.01) -> nn.Module:
    return perturb(model, seed, size)


def world(folder: Path, tied: bool = False) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """Save a base and two experts of one seed; return the recipe's paths and the models."""
    models = {"a": near(Net(0, tied), 1), "b": near(Net(0, tied), 2)}
    paths = {}
    for name, model in {"base": Net(0, tied), **models}.items():
        held = {k: v for k, v in model.state_dict().items() if not k.startswith("lm_head")}
        paths[name] = save(folder / name, held)
    return {"base": paths.pop("base"), "experts": paths}, models


def with_statistics(recipe: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any]:
    experts = {n: {"path": p, "statistics": files[n]} for n, p in recipe["experts"].items()}
    return {**recipe, "experts": experts, "method": "regmean"}


def test_another_experts_statistics_are_refused_and_can_be_accepted(tmp_path: Path) -> None:
    recipe, models = world(tmp_path)
    files = {n: tmp_path / f"{n}.stats.safetensors" for n in models}
    for name, model in models.items():
        eutectic.collect(model, BATCHES, files[name])
    right = with_statistics(recipe, files)
    eutectic.merge(right, output=tmp_path / "right")
    swapped = with_statistics(recipe, {"a": files["b"], "b": files["a"]})
    with pytest.raises(RecipeError) as refused:
        eutectic.merge(swapped, output=tmp_path / "swapped")
    text = str(refused.value)
    assert "statistics of 'a' were collected on another checkpoint" in text
    assert "statistics of 'b' were collected on another checkpoint" in text
    assert "statistics_of: any" in text
    eutectic.merge(swapped, statistics_of="any", output=tmp_path / "swapped")
    assert not torch.equal(
        load(tmp_path / "swapped")["second.weight"], load(tmp_path / "right")["second.weight"]
    )
    words = [f"{n}={p}" for n, p in recipe["experts"].items()]
    options = ["--base", recipe["base"], "-m", "regmean", "-o", tmp_path / "by-words", *words]
    options += ["-s", f"a={files['b']}", "-s", f"b={files['a']}"]
    answer = invoke("merge", *options)
    assert (answer.code, "collected on another checkpoint" in answer.err) == (2, True)
    assert invoke("merge", *options, "--set", "statistics_of=any").code == 0


def test_statistics_in_memory_are_recognised_too() -> None:
    models = {"a": near(Net(0), 1), "b": near(Net(0), 2)}
    statistics = {n: eutectic.collect(m, BATCHES) for n, m in models.items()}
    base, experts = Net(0).state_dict(), {n: m.state_dict() for n, m in models.items()}
    eutectic.merge_state_dicts(base, experts, method="regmean", statistics=statistics)
    swapped = {"a": statistics["b"], "b": statistics["a"]}
    with pytest.raises(RecipeError, match="another checkpoint"):
        eutectic.merge_state_dicts(base, experts, method="regmean", statistics=swapped)


@pytest.mark.parametrize("case", ["tied", "half", "run in half", "sharded", "prefix"])
def test_no_false_alarm(case: str, tmp_path: Path) -> None:
    recipe, models = world(tmp_path, tied=case == "tied")
    files = {n: tmp_path / f"{n}.stats.safetensors" for n in models}
    for name, model in models.items():
        folder = recipe["experts"][name]
        tensors = load(folder)
        if case == "half":
            tensors = {k: v.to(torch.bfloat16) for k, v in tensors.items()}
            save(folder, tensors)
            model.load_state_dict(tensors)  # run in float32, as `eutectic collect` does
        if case == "sharded":
            (folder / "model.safetensors").unlink()
            halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
            shards = {f"model-0000{i}-of-00002.safetensors": h for i, h in enumerate(halves, 1)}
            save_sharded(folder, shards)
        batches = BATCHES
        if case == "run in half":
            model, batches = model.to(torch.bfloat16), [b.to(torch.bfloat16) for b in BATCHES]
        if case == "prefix":
            model = nn.ModuleDict({"encoder": model})
            model.forward = model["encoder"].forward  # type: ignore[method-assign]
        eutectic.collect(model, batches, files[name])
    report = eutectic.merge(with_statistics(recipe, files), output=tmp_path / "merged")
    assert report.merged_by["regmean"] >= 2
    assert not any("prove" in note for note in report.notes)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks by names that are going away
def test_lora_experts_are_known_by_their_effective_weights(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    base = tmp_path / "base"
    make_model("bert").save_pretrained(base)
    ids = torch.randint(3, 39, (4, 7), generator=torch.Generator().manual_seed(0))
    paths, files = {}, {}
    for seed, name in enumerate("ab"):
        config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value"])
        model = peft.get_peft_model(make_model("bert"), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        paths[name], files[name] = tmp_path / name, tmp_path / f"{name}.stats.safetensors"
        model.save_pretrained(str(paths[name]))
        eutectic.collect(model, [{"input_ids": ids}], files[name])
    recipe = {"base": base, "experts": paths}
    eutectic.merge(with_statistics(recipe, files), output=tmp_path / "merged")
    swapped = with_statistics(recipe, {"a": files["b"], "b": files["a"]})
    with pytest.raises(RecipeError, match="another checkpoint: 4 of"):
        eutectic.merge(swapped, output=tmp_path / "swapped")


def test_statistics_of_another_layout_are_refused(tmp_path: Path) -> None:
    recipe, models = world(tmp_path)
    files = {n: tmp_path / f"{n}.stats.safetensors" for n in models}
    for name in models:
        wide = nn.Sequential()
        wide.add_module("first", nn.Linear(6, 10))
        wide.add_module("second", nn.Linear(10, 6))
        eutectic.collect(wide, BATCHES, files[name])
    with pytest.raises(RecipeError, match=r"another layout: first.weight is \[10, 6\]"):
        eutectic.merge(with_statistics(recipe, files), output=tmp_path / "merged")


class Attention(nn.Module):
    """Self-attention, then cross-attention with queries of one side and keys of the other."""

    def __init__(self, cross: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.kind = cross

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.own(x, x, x)[0]
        values = y if self.kind == "shared" else y.flip(-1)
        return self.cross(x, y, values)[0].mean(1)


def attention_world(cross: str) -> tuple[Any, ...]:
    models = {n: near(Attention(cross), s, 0.05) for s, n in enumerate("ab", start=1)}
    generator = torch.Generator().manual_seed(5)
    data = [[torch.randn(16, n, 8, generator=generator) for n in (5, 7)] for _ in range(3)]

    def objective(outputs: Tensor, batch: Any) -> Tensor:
        return -outputs.square().sum(1)

    statistics = {
        name: eutectic.collect(
            model, data, output_gradients=True, fisher=True, objective=objective, unmatched="all"
        )
        for name, model in models.items()
    }
    base = Attention(cross).state_dict()
    return base, {n: m.state_dict() for n, m in models.items()}, statistics


METHODS: dict[str, dict[str, Any]] = {
    "regmean": {"off_diagonal": 1.0},
    "mats": {"operator": "kfac", "iterations": 30},
    "esm": {"preset": None},
    "iso_a": {},
}


@pytest.mark.parametrize("cross", ["shared", "apart"])
@pytest.mark.parametrize("method", METHODS)
def test_cross_attention_is_merged_part_by_part(method: str, cross: str) -> None:
    base, experts, statistics = attention_world(cross)
    assert "cross.in_proj_weight[q]" in statistics["a"]
    options = METHODS[method]
    if method == "iso_a" and "iso_a" not in eutectic.methods():
        pytest.skip("not registered")
    merged = eutectic.merge_state_dicts(
        base, experts, method=method, statistics=statistics, scale=1.0, **options
    )

    def oracle(name: str, rows: slice, part: str) -> Tensor:
        deltas = torch.stack([e[name][rows] - base[name][rows] for e in experts.values()])
        own = [s[f"{name}{part}"] for s in statistics.values()]
        if method == "mats":
            own = [_only(s, rows if not part else slice(None)) for s in own]
        delta = merge_matrices(
            method, deltas, base=base[name][rows], statistics=own, experts=list(experts),
            tensor=name + (f"[{'qkv'.index(part[1])}]" if part else ""), **options,
        )  # fmt: skip
        return base[name][rows] + delta

    whole = oracle("own.in_proj_weight", slice(None), "")
    torch.testing.assert_close(merged["own.in_proj_weight"], whole)
    for i, part in enumerate(("[q]", "[k]", "[v]")):
        rows = slice(8 * i, 8 * i + 8)
        wanted = oracle("cross.in_proj_weight", rows, part)
        torch.testing.assert_close(merged["cross.in_proj_weight"][rows], wanted, msg=part)


def _only(statistics: LayerStatistics, rows: slice) -> LayerStatistics:
    outer = statistics.output_gradient_gram
    assert outer is not None
    return LayerStatistics(
        gram=statistics.gram,
        gram_factor=statistics.gram_factor,
        count=statistics.count,
        output_gradient_gram=outer[rows, rows],
    )


def test_a_diagonal_fisher_of_cross_attention_stays_whole() -> None:
    base, experts, statistics = attention_world("shared")
    merged = eutectic.merge_state_dicts(
        base, experts, method="fisher", statistics=statistics, scale=1.0
    )
    name = "cross.in_proj_weight"
    fishers = torch.stack([s[name].fisher_diagonal for s in statistics.values()]).double()
    deltas = torch.stack([e[name] - base[name] for e in experts.values()]).double()
    fishers = (fishers / statistics["a"][name].sample_count).clamp_min(1e-8)
    wanted = base[name] + ((fishers * deltas).sum(0) / fishers.sum(0)).float()
    torch.testing.assert_close(merged[name], wanted)


def test_rows_that_span_query_and_key_take_the_fallback() -> None:
    base, experts, statistics = attention_world("shared")
    name = "cross.in_proj_weight"

    def merged(heights: list[int], method: str) -> Tensor:
        rules = [{"match": name, "split": heights}]
        return eutectic.merge_state_dicts(
            base, experts, method=method, statistics=statistics, scale=1.0, tensors=rules
        )[name]

    torch.testing.assert_close(merged([12, 12], "esm"), merged([12, 12], "tsv_m"))
    refined = merged([4, 4, 8, 8], "regmean")
    torch.testing.assert_close(refined, merged([8, 8, 8], "regmean"))
