"""Guards `eutectic convert`: both recipes give the same merge, or it is told what has no words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from helpers.cli import invoke
from helpers.folders import Tensors, load, save

LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b", "c")):
        generator = torch.Generator().manual_seed(seed)
        tensors: Tensors = {"model.embed_tokens.weight": torch.randn(9, 4, generator=generator)}
        for n in range(LAYERS):
            for kind in ("self_attn.q_proj", "mlp.up_proj"):
                own = torch.randn(4, 4, generator=generator)
                tensors[f"model.layers.{n}.{kind}.weight"] = own
        tensors["model.norm.weight"] = torch.randn(4, generator=generator)
        config = {"model_type": "llama", "num_hidden_layers": LAYERS, "tie_word_embeddings": False}
        save(place / name, tensors, config)
    return place


SAID = {
    "gradients-and-filters": """
models:
  - {model: a, parameters: {weight: [0, 1, 0.5], density: 0.5}}
  - model: b
    parameters: {weight: [{filter: mlp, value: [1, 0]}, {filter: norm, value: 2}, {value: 0.3}]}
merge_method: ties
base_model: base
parameters: {density: [1, 0.4], normalize: false, lambda: 0.7}
dtype: float32
""",
    "slerp": """
models: [a, b]
base_model: b
merge_method: slerp
parameters: {t: [{filter: self_attn, value: [0, 1]}, {value: 0.4}]}
""",
    "mean-without-base": """
models: [{model: a, parameters: {weight: 2}}, {model: b, parameters: {weight: [1, 3]}}]
merge_method: linear
""",
    "sum": """
models: [{model: a, parameters: {weight: 0.2}}, {model: b, parameters: {weight: 0.4}}]
merge_method: linear
parameters: {normalize: false}
out_dtype: bfloat16
""",
    "layers": """
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [1, 3], parameters: {weight: [1, 0]}}
  - sources:
      - {model: base, layer_range: [1, 2]}
      - {model: b, layer_range: [2, 3]}
    parameters: {weight: 3, density: 0.5}
merge_method: ties
base_model: base
parameters: {weight: 0.5}
""",
    "normalised": """
models: [{model: a, parameters: {weight: 2}}, {model: b, parameters: {weight: 3}}]
merge_method: task_arithmetic
base_model: base
parameters: {normalize: true, lambda: 2}
""",
    "ours": """
models: [{model: a}, {model: b, parameters: {weight: 3}}]
merge_method: average
base_model: base
""",
}


@pytest.mark.parametrize("kind", SAID)
def test_the_same_merge(folder, tmp_path, kind):
    recipe, own = folder / f"{kind}.yml", folder / f"{kind}.yaml"
    recipe.write_text(SAID[kind])
    answer = invoke("convert", recipe, "-o", own)
    assert answer.code == 0, answer.err
    for source, output in ((recipe, "one"), (own, "two")):
        answer = invoke("merge", source, "-o", tmp_path / output)
        assert answer.code == 0, answer.err
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "models: [{model: a, parameters: {weight: [1, 2]}}, {model: b}]\n"
            "merge_method: task_arithmetic\nbase_model: base\n"
            "parameters: {normalize: true, weight: 1}\n",
            "α differs from tensor to tensor",
        ),
        (
            "slices:\n- sources: [{model: base, layer_range: [0, 1]}, {model: a, layer_range: "
            "[0, 1]}]\n- sources: [{model: b, layer_range: [0, 1]}, {model: a, layer_range: [1, 2]"
            "}]\n  base_model: b\nmerge_method: ties\nbase_model: base\nparameters: {weight: 1}\n",
            "one base for all layers",
        ),
        (
            "modules: {text: {models: [{model: a}]}}\nmerge_method: passthrough\n",
            "no parts of models",
        ),
        ("base: x\nexperts: {}\nmethod: ties\n", "no mergekit configuration"),
    ],
)
def test_what_has_no_words_is_told(folder, text, why):
    recipe = folder / "faulty.yml"
    recipe.write_text(text)
    answer = invoke("convert", recipe)
    assert answer.code == 2
    assert why in answer.err


def test_it_is_printed_for_pipes_and_written_beside(folder, tmp_path):
    recipe = folder / "recipe.yml"
    recipe.write_text("models: [{model: a}, {model: b}]\nmerge_method: karcher\n")
    assert "method: karcher" in invoke("convert", recipe).out
    told = json.loads(invoke("convert", recipe, "--json").out)
    assert told["base"] is None
    assert list(told["experts"]) == ["a", "b"]
    assert told["method"] == "karcher"
    invoke("convert", recipe, "-o", folder / "own.yaml")
    written = yaml.safe_load((folder / "own.yaml").read_text())
    assert written["experts"] == {"a": "./a", "b": "./b"}
    again = invoke("convert", recipe, "-o", folder / "own.yaml")
    assert (again.code, "exists" in again.err) == (2, True)


def test_stages_are_planned_as_far_as_their_inputs_are_there(folder):
    recipe = folder / "stages.yml"
    recipe.write_text(
        "name: mean\nmerge_method: linear\nmodels: [a, b]\nparameters: {weight: 1}\n---\n"
        "merge_method: slerp\nmodels: [mean, c]\nbase_model: mean\nparameters: {t: 0.5}\n"
    )
    told = json.loads(invoke("plan", recipe, "--json").out)["stages"]
    assert [(s["stage"], s["reads"], "tensors" in s) for s in told] == [
        ("mean", [], True),
        ("", ["mean"], False),
    ]
    shown = invoke("plan", recipe)
    assert shown.code == 0
    assert "planned when what it reads has been merged" in shown.out + shown.err
