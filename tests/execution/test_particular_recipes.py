"""Guards what recipes of ours say of single tensors: numbers against sums written out here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import eutectic
from eutectic.errors import RecipeError, RequestError
from helpers.folders import Tensors, load, save

LAYERS = 3
CONFIG = {"model_type": "llama", "num_hidden_layers": LAYERS, "tie_word_embeddings": False}


def model(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors: Tensors = {"model.embed_tokens.weight": randn(10, 5)}
    for n in range(LAYERS):
        tensors[f"model.layers.{n}.self_attn.q_proj.weight"] = randn(5, 5)
        tensors[f"model.layers.{n}.mlp.up_proj.weight"] = randn(7, 5)
    tensors["model.norm.weight"] = randn(5)
    tensors["lm_head.weight"] = randn(10, 5)
    return tensors


MODELS = {name: model(seed) for seed, name in enumerate(("base", "a", "b"))}
BASE, A, B = MODELS.values()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for name, tensors in MODELS.items():
        save(place / name, tensors, CONFIG)
    return place


@pytest.fixture
def merged(folder, tmp_path) -> Callable[..., Tensors]:
    def run(text: str) -> Tensors:
        recipe = folder / f"{tmp_path.name}.yaml"
        recipe.write_text(text)
        eutectic.merge(recipe, output=tmp_path / "out", threads=1)
        return load(tmp_path / "out")

    return run


def depth(name: str) -> float:
    return int(name.split(".")[2]) / (LAYERS - 1) if ".layers." in name else 0.0


def agree(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_weights_over_depth_and_by_name(merged):
    text = """
base: base
experts:
  a: {path: a, weight: [0.2, 0.8]}
  b: {path: b, weight: [{match: "*mlp*", value: [1, 0]}, {match: "*norm*", value: 3}, {value: 2}]}
method: task_arithmetic
scale: 0.5
"""

    def b(name: str) -> float:
        return 1 - depth(name) if "mlp" in name else 3 if "norm" in name else 2

    agree(
        merged(text),
        {
            n: BASE[n] + 0.5 * ((0.2 + 0.6 * depth(n)) * (A[n] - BASE[n]) + b(n) * (B[n] - BASE[n]))
            for n in BASE
        },
    )


def test_parameters_over_depth_of_an_expert_and_of_all(merged):
    text = """
base: base
experts:
  a: {path: a, parameters: {density: [1, 0]}}
  b: b
method: ties
parameters: {density: [{match: "*mlp*", value: 1}, {match: "*", value: [0, 1]}], aggregate: sum}
"""

    def kept(delta: torch.Tensor, density: float) -> torch.Tensor:
        count = int(density * delta.numel())
        if count == 0:
            return torch.zeros_like(delta)
        bound = delta.abs().flatten().sort(descending=True).values[count - 1]
        return torch.where(delta.abs() >= bound, delta, 0)

    def ties(name: str) -> torch.Tensor:
        of_b = 1 if "mlp" in name else depth(name)
        pair = [
            kept(A[name] - BASE[name], 1 - depth(name)),
            kept(B[name] - BASE[name], of_b),
        ]
        sign = torch.sign(pair[0] + pair[1])
        return BASE[name] + sum(torch.where(torch.sign(x) == sign, x, 0) for x in pair)

    agree(merged(text), {n: ties(n) for n in BASE})


def test_rules_have_methods_parameters_and_weights(merged):
    text = """
base: base
experts: {a: a, b: {path: b, weight: 4}}
method: task_arithmetic
tensors:
  - {match: "*mlp*", method: linear, parameters: {normalize: false}}
  - {match: "*q_proj*", weights: {a: [0, 2]}}
  - {match: "*norm*", method: slerp, parameters: {t: 0.25}, weights: {a: 1, b: 1}}
  - {match: "lm_head*", scale: 2}
"""

    def wanted(name: str) -> torch.Tensor:
        a, b, base = A[name], B[name], BASE[name]
        if "mlp" in name:
            return a + 4 * b
        if "norm" in name:
            angle = torch.arccos((a @ b) / a.norm() / b.norm())
            return (torch.sin(0.75 * angle) * a + torch.sin(0.25 * angle) * b) / torch.sin(angle)
        weight = 2 * depth(name) if "q_proj" in name else 1
        scale = 2 if "lm_head" in name else 1
        return base + scale * (weight * (a - base) + 4 * (b - base))

    agree(merged(text), {n: wanted(n) for n in BASE})


def test_layers_of_several_experts(merged, tmp_path):
    text = """
base: base
experts: {a: a, b: b}
method: task_arithmetic
layers:
  - {a: [0, 2]}
  - take: {b: [1, 3], base: [0, 2]}
    weights: {b: [0.5, 2]}
  - take: {a: [2, 3], b: [2, 3]}
"""
    wanted: Tensors = {}
    rows = [(A, 0, 0, 1), (A, 1, 1, 1), (B, 1, 0, 0.5), (B, 2, 1, 2)]
    for kind in ("self_attn.q_proj", "mlp.up_proj"):
        at = "model.layers.{}." + kind + ".weight"
        for out, (own, n, under, weight) in enumerate(rows):
            base = BASE[at.format(under)]
            wanted[at.format(out)] = base + weight * (own[at.format(n)] - base)
        base = BASE[at.format(2)]
        wanted[at.format(4)] = base + (A[at.format(2)] - base) + (B[at.format(2)] - base)
    wanted["model.embed_tokens.weight"] = A["model.embed_tokens.weight"]
    for name in ("model.norm.weight", "lm_head.weight"):
        wanted[name] = A[name] + B[name] - BASE[name]
    agree(merged(text), wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    told = json.loads((tmp_path / "out" / "eutectic.json").read_text())
    assert told["recipe"]["layers"][0] == {"take": {"a": [0, 2]}}


def test_models_are_merged_as_they_are_without_a_base(merged, tmp_path):
    text = """
base: null
experts: {a: {path: a, weight: [0, 1]}, b: b}
method: linear
"""
    agree(merged(text), {n: (depth(n) * A[n] + B[n]) / (depth(n) + 1) for n in A})
    assert json.loads((tmp_path / "out" / "eutectic.json").read_text())["recipe"]["base"] is None


def test_a_search_for_the_scale_goes_with_settings(folder, tmp_path):
    values = {
        "base": str(folder / "base"),
        "experts": {"a": {"path": str(folder / "a"), "weight": [1, 2]}, "b": str(folder / "b")},
        "method": "task_arithmetic",
    }
    plain = eutectic.merge(values, scale=0.7, output=tmp_path / "plain")
    assert plain.scale == 0.7
    found = load(tmp_path / "plain")
    agree(
        found,
        {n: BASE[n] + 0.7 * ((1 + depth(n)) * (A[n] - BASE[n]) + B[n] - BASE[n]) for n in BASE},
    )


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"experts": {"a": {"path": "a", "weight": [1, "x"]}, "b": "b"}}, "value_error"),
        ({"experts": {"a": {"path": "a", "weight": []}, "b": "b"}}, "value_error"),
        ({"experts": {"a": {"path": "a", "weight": [{"vale": 1}]}, "b": "b"}}, "value_error"),
        ({"parameters": {"density": [0.5, 3]}}, "less_than_equal"),
        ({"parameters": {"density": [{"match": "*", "value": -1}]}}, "greater_than_equal"),
        ({"tensors": [{"match": "*"}]}, "value_error"),
        ({"tensors": [{"match": "*", "method": "tise"}]}, "parameters"),
        ({"tensors": [{"match": "*", "method": "slerp", "parameters": {"t": 2}}]}, "parameters"),
        ({"tensors": [{"match": "*", "weights": {"c": 2}}]}, "unknown_expert"),
        ({"layers": [{"a": [0, 2], "c": [0, 2]}]}, "unknown_expert"),
        ({"layers": [{"a": [0, 2], "b": [0, 1]}]}, "layer_range"),
        ({"layers": [{"base": [0, 2]}]}, "layer_range"),
        ({"layers": [{"a": [2, 2]}]}, "value_error"),
        ({"layers": [{"a": [0, 9]}]}, "other_depth"),
        ({"layers": [{"a": [0, 2]}], "heads": "per_expert"}, "heads_of_layers"),
        ({"base": None}, "no_base"),
        ({"base": None, "method": "linear", "layers": [{"base": [0, 1], "a": [0, 1]}]}, "no_base"),
    ],
)
def test_faults(folder, tmp_path, change, kind):
    values: dict[str, Any] = {
        "base": "base",
        "experts": {"a": "a", "b": "b"},
        "method": "ties",
        **change,
    }
    recipe = folder / "faulty.yaml"
    recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError) as caught:
        eutectic.merge(recipe, output=tmp_path / "out")
    assert kind in {fault.kind for fault in caught.value.faults}, caught.value.faults
    assert "<" not in str(caught.value)


RULES = """
base: base
experts: {a: a, b: b}
method: task_arithmetic
tensors: [{match: "*mlp*", method: average}]
"""


def test_options_win_over_recipes_with_rules(folder, tmp_path):
    recipe = folder / "rules.yaml"
    recipe.write_text(RULES)
    asked = {"scale": 0.5, "dtype": "float64", "post": "svc:directions=sum"}
    planned = eutectic.plan(recipe, **asked)
    assert (planned.scale, planned.named) == (0.5, "task_arithmetic + svc")
    rows = {row["name"]: row["merged_by"] for row in planned.tensors}
    assert rows["model.layers.0.mlp.up_proj.weight"] == "average + svc"
    eutectic.merge(recipe, scale=0.5, output=tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj.weight"
    wanted = BASE[name] + 0.5 * (A[name] + B[name] - 2 * BASE[name])
    torch.testing.assert_close(load(tmp_path / "out")[name], wanted)
    with pytest.raises(RecipeError, match="unknown post-processor"):
        eutectic.plan(recipe, post="none")
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text("tasks: {a: {kind: function, function: 'math:prod'}}")
    with pytest.raises(RequestError, match="says something of single tensors"):
        eutectic.compare(
            recipe, methods=["ties"], tasks=tasks, output=tmp_path / "t", trust_code=True
        )


def test_mergekit_configurations_are_not_searched(folder):
    models = [
        {"model": str(folder / n), "parameters": {"weight": w}} for n, w in (("a", 2), ("b", 0))
    ]
    stated = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": models,
    }
    (folder / "kit.yaml").write_text(yaml.safe_dump(stated))
    for recipe in (folder / "kit.yaml", stated):
        with pytest.raises(RequestError, match="eutectic convert"):
            eutectic.tune(recipe, search="norm")
    with pytest.raises(RequestError, match="a finite number"):
        asked = {"experts": {"a": folder / "a"}, "method": "ties", "search": "norm"}
        eutectic.tune(base=folder / "base", over="density", at=float("nan"), **asked)


def test_options_win_over_stacks_of_layers_without_a_base(folder, tmp_path):
    recipe = folder / "stack.yaml"
    recipe.write_text(
        "base: null\nexperts: {a: a, b: b}\nmethod: passthrough\n"
        "layers: [{take: {a: [0, 2]}}, {take: {b: [1, 3]}}]\n"
    )
    eutectic.merge(recipe, dtype="float64", output=tmp_path / "out")
    found = load(tmp_path / "out")
    name = "model.layers.{}.mlp.up_proj.weight".format
    for place, (owner, layer) in enumerate([(A, 0), (A, 1), (B, 1), (B, 2)]):
        assert torch.equal(found[name(place)], owner[name(layer)].double())
