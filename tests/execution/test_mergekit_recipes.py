"""Guards what mergekit's configurations merge: numbers against sums written out here."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import eutectic
from eutectic.errors import RecipeError
from eutectic.planning.inputs import open_inputs, reopen
from eutectic.recipes.load import check_recipe
from eutectic.recipes.mergekit_stages import check_stages, read_stages
from helpers.folders import Tensors, load, save

LAYERS = 4
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "tie_word_embeddings": False,
    "layer_types": ["full", "sliding", "full", "sliding"],
    "mlp_only_layers": [1, 2],
}


def model(seed: int, layers: int = LAYERS) -> Tensors:
    """Return a state dict in the manner of a Llama, without what a test has no use for."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors: Tensors = {"model.embed_tokens.weight": randn(12, 6)}
    for n in range(layers):
        tensors[f"model.layers.{n}.self_attn.q_proj.weight"] = randn(6, 6)
        tensors[f"model.layers.{n}.mlp.up_proj.weight"] = randn(8, 6)
        tensors[f"model.layers.{n}.input_layernorm.weight"] = randn(6)
    tensors["model.norm.weight"] = randn(6)
    tensors["lm_head.weight"] = randn(12, 6)
    return tensors


NAMES = ("base", "a", "b", "c")
MODELS = {name: model(seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for name in NAMES:
        kinds = [f"{kind}-{name}" for kind in CONFIG["layer_types"]]
        save(place / name, MODELS[name], {**CONFIG, "layer_types": kinds})
    return place


@pytest.fixture
def merged(folder, tmp_path) -> Callable[..., Tensors]:
    def run(text: str, **options: Any) -> Tensors:
        recipe = folder / f"{tmp_path.name}.yml"
        recipe.write_text(text)
        eutectic.merge(recipe, output=tmp_path / "out", threads=1, **options)
        return load(tmp_path / "out")

    return run


def depth(name: str, layers: int = LAYERS) -> float | None:
    number = name.split(".")[2] if name.startswith("model.layers.") else None
    return None if number is None else int(number) / (layers - 1)


def agree(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_weighted_mean(merged):
    text = """
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 3}}
merge_method: linear
"""
    a, b = MODELS["a"], MODELS["b"]
    agree(merged(text), {n: (a[n] + 3 * b[n]) / 4 for n in a})


def test_gradients_run_over_the_layers_and_start_outside_of_them(merged):
    text = """
models:
  - {model: a, parameters: {weight: [0, 1, 4]}}
  - {model: b, parameters: {weight: 1}}
merge_method: task_arithmetic
base_model: base
"""
    base, a, b = (MODELS[n] for n in ("base", "a", "b"))

    def weight(name: str) -> float:
        at = depth(name)
        return 0.0 if at is None else 2 * at if at <= 0.5 else 1 + 3 * (2 * at - 1)

    agree(
        merged(text),
        {n: base[n] + weight(n) * (a[n] - base[n]) + (b[n] - base[n]) for n in base},
    )


def test_filters_are_parts_of_names_and_the_first_that_fits_decides(merged):
    text = """
models:
  - model: a
    parameters:
      weight:
        - {filter: mlp, value: 2}
        - {filter: layers.1., value: 3}
        - {filter: "*", value: 4}
        - {filter: self_attn, value: 5}
merge_method: task_arithmetic
base_model: base
"""
    base, a = MODELS["base"], MODELS["a"]

    def weight(name: str) -> float:
        return 2 if "mlp" in name else 3 if "layers.1." in name else 4

    agree(merged(text), {n: base[n] + weight(n) * (a[n] - base[n]) for n in base})


def test_the_narrowest_place_wins(merged):
    text = """
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: 10}]}}
    parameters: {weight: [{filter: self_attn, value: 20}]}
  - sources:
      - {model: base, layer_range: [2, 4]}
      - {model: a, layer_range: [2, 4]}
merge_method: task_arithmetic
base_model: base
parameters: {weight: 30, lambda: 0.5}
"""
    base, a = MODELS["base"], MODELS["a"]

    def weight(name: str) -> float:
        first = any(f"layers.{n}." in name for n in (0, 1))
        return 10 if first and "mlp" in name else 20 if first and "attn" in name else 30

    agree(merged(text), {n: base[n] + weight(n) / 2 * (a[n] - base[n]) for n in base})


def test_slerp_goes_from_the_base_to_the_other(merged):
    text = """
models: [a, b]
merge_method: slerp
base_model: b
parameters:
  t: [{filter: mlp, value: [0, 1]}, {value: 0.25}]
"""
    a, b = MODELS["a"], MODELS["b"]

    def slerp(name: str) -> torch.Tensor:
        t = depth(name) if "mlp" in name else 0.25
        x, y = b[name].double(), a[name].double()
        angle = torch.arccos((x * y).sum() / x.norm() / y.norm())
        mixed = (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)
        return mixed.float()

    agree(merged(text), {n: slerp(n) for n in a})


def test_layers_of_two_models_make_a_deeper_one(merged, tmp_path):
    text = """
slices:
  - sources: [{model: a, layer_range: [0, 3], parameters: {weight: 1}}]
  - sources: [{model: b, layer_range: [1, 4], parameters: {weight: 1}}]
merge_method: linear
dtype: float32
"""
    a, b = MODELS["a"], MODELS["b"]
    wanted: Tensors = {"model.embed_tokens.weight": a["model.embed_tokens.weight"]}
    for out, (own, n) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        for kind in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"):
            wanted[f"model.layers.{out}.{kind}.weight"] = own[f"model.layers.{n}.{kind}.weight"]
    wanted |= {n: b[n] for n in ("model.norm.weight", "lm_head.weight")}
    found = merged(text)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == [
        *("full-a", "sliding-a", "full-a", "sliding-b", "full-b", "sliding-b")
    ]
    assert config["mlp_only_layers"] == [1, 2, 3, 4]


def test_a_slice_may_have_a_base_of_its_own(merged):
    text = """
slices:
  - sources:
      - {model: base, layer_range: [0, 1]}
      - {model: a, layer_range: [3, 4]}
  - sources:
      - {model: b, layer_range: [1, 3]}
      - {model: c, layer_range: [0, 2]}
    base_model: b
    parameters: {weight: [0.5, 2]}
merge_method: task_arithmetic
base_model: base
parameters: {weight: [3, 1]}
"""
    base, a, b, c = (MODELS[n] for n in NAMES)
    wanted: Tensors = {}
    name = "model.embed_tokens.weight"
    wanted[name] = base[name] + 3 * (a[name] - base[name])  # outside the layers: the first value
    for kind in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"):
        at = "model.layers.{}." + kind + ".weight"
        # A slice of one layer takes a gradient's last value.
        wanted[at.format(0)] = base[at.format(0)] + 1 * (a[at.format(3)] - base[at.format(0)])
        wanted[at.format(1)] = b[at.format(1)] + 0.5 * (c[at.format(0)] - b[at.format(1)])
        wanted[at.format(2)] = b[at.format(2)] + 2 * (c[at.format(1)] - b[at.format(2)])
    for name in ("model.norm.weight", "lm_head.weight"):
        wanted[name] = b[name] + 0.5 * (c[name] - b[name])
    agree(merged(text), wanted)


def test_a_layer_that_a_model_lacks_is_refused_with_its_line(merged):
    text = """
slices:
  - sources: [{model: a, layer_range: [2, 5], parameters: {weight: 1}}]
merge_method: linear
"""
    with pytest.raises(RecipeError) as caught:
        merged(text)
    (fault,) = caught.value.faults
    assert (fault.kind, fault.line) == ("other_depth", 3)
    assert "'a' has 4 layers, got [2, 5]" in str(fault).replace("the base", "'a'")


def test_the_output_dtype(merged):
    text = """
models: [{model: a, parameters: {weight: 1}}]
merge_method: linear
dtype: float32
out_dtype: bfloat16
"""
    found = merged(text)
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    agree(found, {n: t.bfloat16() for n, t in MODELS["a"].items()})


def test_the_same_from_python_and_again_from_the_journal(folder, tmp_path):
    values = {
        "models": [
            {"model": str(folder / "a"), "parameters": {"weight": [0, 1], "density": 0.5}},
            {"model": str(folder / "b"), "parameters": {"weight": 0.5}},
        ],
        "merge_method": "dare_ties",
        "base_model": str(folder / "base"),
    }
    (folder / "dare.yml").write_text(yaml.safe_dump(values))
    eutectic.merge(values, output=tmp_path / "one", seed=5)
    eutectic.merge(folder / "dare.yml", output=tmp_path / "two", seed=5, threads=1)
    eutectic.merge(values, output=tmp_path / "three", seed=6)
    one, two, three = (load(tmp_path / name) for name in ("one", "two", "three"))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not all(torch.equal(one[n], three[n]) for n in one)
    told = json.loads((tmp_path / "one" / "eutectic.json").read_text())
    assert told["recipe"]["merge_method"] == "dare_ties"
    assert told["recipe"]["base_model"] == "base"  # no folder of this machine is published
    assert str(folder) not in (tmp_path / "one" / "README.md").read_text()


def test_adapters(folder, tmp_path):
    generator = torch.Generator().manual_seed(9)
    name = "model.layers.1.self_attn.q_proj"
    lora = tmp_path / "lora"
    lora.mkdir()
    factors = {"A": torch.randn(2, 6, generator=generator), "B": torch.randn(6, 2)}
    from safetensors.torch import save_file

    save_file(
        {f"base_model.model.{name}.lora_{s}.weight": f for s, f in factors.items()},
        lora / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    change = 2 * factors["B"] @ factors["A"]
    base, a = MODELS["base"], MODELS["a"]
    one = {"model": f"{folder / 'a'}+{lora}", "parameters": {"weight": 2.0}}
    two = {"model": f"{folder / 'base'}+{lora}", "parameters": {"weight": 3.0}}
    recipe = {"models": [one, two], "merge_method": "task_arithmetic"}
    eutectic.merge({**recipe, "base_model": str(folder / "base")}, output=tmp_path / "out")
    wanted = {n: base[n] + 2 * (a[n] - base[n]) for n in base}
    wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + 5 * change
    agree(load(tmp_path / "out"), wanted)
    eutectic.merge({**recipe, "merge_method": "linear"}, output=tmp_path / "mean")
    wanted = {n: (2 * a[n] + 3 * base[n]) / 5 for n in base}
    wanted[f"{name}.weight"] = wanted[f"{name}.weight"] + change
    agree(load(tmp_path / "mean"), wanted)


STAGES = """
name: mean
merge_method: linear
models: [{{model: {0}/a}}, {{model: {0}/b}}]
parameters: {{weight: 1}}
---
name: deeper
merge_method: linear
slices:
  - sources: [{{model: mean, layer_range: [0, 2]}}]
  - sources: [{{model: {0}/c, layer_range: [1, 4]}}]
parameters: {{weight: 1}}
---
merge_method: linear
models: [{{model: deeper}}]
parameters: {{weight: 1}}
"""


def test_stages_merge_what_others_wrote(folder, tmp_path):
    recipe = tmp_path / "stages.yml"
    recipe.write_text(STAGES.format(folder))
    report = eutectic.merge(recipe, output=tmp_path / "out")
    a, b, c = (MODELS[n] for n in "abc")
    mean = {n: (a[n] + b[n]) / 2 for n in a}
    wanted = {"model.embed_tokens.weight": mean["model.embed_tokens.weight"]}
    for out, (own, n) in enumerate([(mean, 0), (mean, 1), (c, 1), (c, 2), (c, 3)]):
        for kind in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"):
            wanted[f"model.layers.{out}.{kind}.weight"] = own[f"model.layers.{n}.{kind}.weight"]
    wanted |= {n: c[n] for n in ("model.norm.weight", "lm_head.weight")}
    agree(load(tmp_path / "out"), wanted)
    assert "stages_kept" in {note.kind for note in report.note_records}
    assert sorted(p.name for p in (tmp_path / "out.stages").iterdir()) == ["deeper", "mean"]
    # A second run keeps finished stages.
    before = (tmp_path / "out.stages" / "mean" / "model.safetensors").stat().st_mtime_ns
    eutectic.merge(recipe, output=tmp_path / "again")
    (tmp_path / "out").rename(tmp_path / "moved")
    eutectic.merge(recipe, output=tmp_path / "out")
    assert (tmp_path / "out.stages" / "mean" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("name: deeper", "name: mean", "stage_name"),
        ("name: deeper", "name: a/b", "stage_name"),
        ("models: [{{model: {0}/a}}", "models: [{{model: deeper}}", "stages_in_a_circle"),
        ("merge_method: linear\nmodels: [{{model: deeper", "models: [{{model: x", "missing_key"),
        ("---\nmerge_method", "---\nname: third\nmerge_method", None),
        ("[{{model: deeper}}]", "[{{model: {0}/a}}]", None),
        ("weight: 1", "wieght: 1", "unknown_parameter"),
    ],
)
def test_faults_of_stages(folder, tmp_path, old, new, kind):
    recipe = tmp_path / "stages.yml"
    recipe.write_text(STAGES.replace(old, new).format(folder))
    if kind is None:
        stages = read_stages(recipe)
        assert stages[-1].name in ("", "third")
        assert len(check_stages(stages, tmp_path, {})) == 3
        return
    with pytest.raises(RecipeError) as caught:
        eutectic.merge(recipe, output=tmp_path / "out")
    assert kind in {fault.kind for fault in caught.value.faults}
    assert all(fault.line for fault in caught.value.faults)
    assert not (tmp_path / "out.stages").exists()


def test_filters_know_a_mixture_by_both_spellings(tmp_path):
    names = [f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight" for n in range(2)]
    names += ["model.layers.0.block_sparse_moe.gate.weight", "model.norm.weight"]
    base = {n: torch.zeros(3, 3) if "norm" not in n else torch.zeros(3) for n in names}
    save(tmp_path / "base", base, {"model_type": "mixtral", "num_hidden_layers": 1})
    ones = {n: torch.ones_like(t) for n, t in base.items()}
    save(tmp_path / "a", ones, {"model_type": "mixtral", "num_hidden_layers": 1})
    weight = [
        {"filter": "gate_up_proj", "value": 2},
        {"filter": "mlp", "value": 3},
        {"filter": "block_sparse_moe", "value": 4},
        {"value": 5},
    ]
    recipe = {
        "models": [{"model": str(tmp_path / "a"), "parameters": {"weight": weight}}],
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
    }
    eutectic.merge(recipe, output=tmp_path / "out")
    found = {n: float(t.flatten()[0]) for n, t in load(tmp_path / "out").items()}
    assert [found[n] for n in names] == [2, 2, 3, 5]


def test_without_a_base_no_change_is_measured(folder, tmp_path):
    recipe = {"models": [{"model": str(folder / n)} for n in "ab"], "merge_method": "karcher"}
    report = eutectic.merge(recipe, output=tmp_path / "out")
    assert not report.norms
    assert not {n.kind for n in report.note_records} & {"exploded", "unrelated", "same_as_base"}


def test_restacked_layers_are_opened_again_elsewhere(folder):
    text = {
        "slices": [
            {"sources": [{"model": str(folder / "a"), "layer_range": [0, 2]}]},
            {"sources": [{"model": str(folder / "b"), "layer_range": [1, 4]}]},
        ],
        "merge_method": "passthrough",
    }
    with open_inputs(check_recipe(text)) as inputs:
        paths = pickle.loads(pickle.dumps(inputs.paths))
        with reopen(paths) as again:
            assert list(again.base.entries) == list(inputs.base.entries)
            assert again.base.fingerprint() == inputs.base.fingerprint()
            for name in again.experts["b"].entries:
                wanted = inputs.experts["b"].read(name)
                assert torch.equal(again.experts["b"].read(name), wanted)
            name = "model.layers.3.mlp.up_proj.weight"
            assert torch.equal(
                again.experts["b"].read(name),
                MODELS["b"]["model.layers.2.mlp.up_proj.weight"].flatten(),
            )
