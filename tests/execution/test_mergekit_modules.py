"""Guards parts of models in mergekit's configurations: text towers, vision towers, two stacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import eutectic
from eutectic.conventions_stacks import belongs_to, main_stacks, stands_before_layers
from eutectic.errors import RecipeError
from helpers.folders import Tensors, load, save

VISION = "model.visual.blocks.{}.attn.qkv.weight"
TEXT = "model.language_model.layers.{}.mlp.up_proj.weight"
CONFIG = {
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": False,
    "text_config": {"model_type": "qwen2_5_vl_text", "num_hidden_layers": 3},
    "vision_config": {"depth": 2, "fullatt_block_indexes": [1]},
}
LOOSE = (
    "model.language_model.embed_tokens.weight",
    "model.language_model.norm.weight",
    "lm_head.weight",
    "model.visual.patch_embed.proj.weight",
    "model.visual.merger.mlp.0.weight",
)


def model(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    names = [*LOOSE, *map(VISION.format, range(2)), *map(TEXT.format, range(3))]
    return {name: torch.randn(6, 4, generator=generator) for name in names}


MODELS = {name: model(seed) for seed, name in enumerate("abc")}
A, B, C = MODELS.values()


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, tensors in MODELS.items():
        save(tmp_path / name, tensors, CONFIG)
    return tmp_path


def merge(folder: Path, text: str) -> tuple[Tensors, dict]:
    (folder / "recipe.yml").write_text(text)
    eutectic.merge(folder / "recipe.yml", output=folder / "out")
    return load(folder / "out"), json.loads((folder / "out" / "config.json").read_text())


def equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def text_layers(*rows: tuple[Tensors, int]) -> Tensors:
    return {TEXT.format(out): own[TEXT.format(n)] for out, (own, n) in enumerate(rows)}


def test_slices_of_a_vision_language_model_are_of_its_text_tower(folder):
    text = """
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 3]}]
merge_method: passthrough
"""
    found, config = merge(folder, text)
    wanted = text_layers((A, 0), (A, 1), (B, 1), (B, 2))
    behind = ("model.language_model.norm.weight", "lm_head.weight")
    wanted |= {n: (B if n in behind else A)[n] for n in A if n in LOOSE or "blocks" in n}
    equal(found, wanted)
    assert config["text_config"]["num_hidden_layers"] == 4
    assert config["vision_config"] == CONFIG["vision_config"]


def test_parts_are_merged_apart_and_those_without_a_word_are_the_bases(folder):
    text = """
modules:
  text_decoder:
    slices:
      - sources:
          - {model: a, layer_range: [1, 3]}
          - {model: b, layer_range: [0, 2], parameters: {weight: [1, 0.5]}}
  multi_modal_projector:
    models: [{model: c}]
    parameters: {weight: 0.25}
merge_method: task_arithmetic
base_model: a
parameters: {weight: 2}
"""
    found, config = merge(folder, text)

    def moved(name: str, other: Tensors, weight: float, own: str | None = None) -> torch.Tensor:
        return A[name] + weight * (other[own or name] - A[name])

    wanted = {n: A[n] for n in A if "visual" in n}
    wanted[TEXT.format(0)] = moved(TEXT.format(1), B, 1, TEXT.format(0))
    wanted[TEXT.format(1)] = moved(TEXT.format(2), B, 0.5, TEXT.format(1))
    wanted |= {n: moved(n, B, 1) for n in LOOSE[:3]}
    merger = "model.visual.merger.mlp.0.weight"
    wanted[merger] = moved(merger, C, 0.25)
    equal(found, wanted)
    assert config["text_config"]["num_hidden_layers"] == 2


def test_layers_of_the_vision_tower(folder):
    text = """
modules:
  vision_tower:
    slices:
      - sources: [{model: b, layer_range: [0, 2]}]
      - sources: [{model: c, layer_range: [1, 2]}]
merge_method: passthrough
base_model: a
"""
    found, config = merge(folder, text)
    assert torch.equal(found[VISION.format(2)], C[VISION.format(1)])
    assert torch.equal(found[VISION.format(0)], B[VISION.format(0)])
    assert torch.equal(found["lm_head.weight"], A["lm_head.weight"])
    assert config["vision_config"] == {"depth": 3, "fullatt_block_indexes": [1, 2]}
    assert config["text_config"]["num_hidden_layers"] == 3


def seq2seq(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    names = ["shared.weight"]
    for stack in ("encoder", "decoder"):
        names += [f"{stack}.block.{n}.layer.0.SelfAttention.q.weight" for n in range(2)]
        names += [f"{stack}.final_layer_norm.weight"]
    return {name: torch.randn(4, 4, generator=generator) for name in names}


def test_two_stacks_have_slices_of_their_own(tmp_path):
    config = {
        "model_type": "t5",
        "is_encoder_decoder": True,
        "num_layers": 2,
        "num_decoder_layers": 2,
    }
    one, two = seq2seq(0), seq2seq(1)
    save(tmp_path / "a", one, config)
    save(tmp_path / "b", two, config)
    slices = "slices: [{sources: [{model: b, layer_range: [0, 2]}]}]"
    with pytest.raises(RecipeError, match=r"2 stacks of layers .*under modules"):
        merge(tmp_path, f"{slices}\nmerge_method: passthrough\nbase_model: a\n")
    text = """
modules:
  decoder:
    slices:
      - sources: [{model: b, layer_range: [0, 2]}]
      - sources: [{model: b, layer_range: [1, 2]}]
  encoder: {models: [{model: b}]}
merge_method: passthrough
base_model: a
"""
    with pytest.raises(RecipeError, match="passthrough takes 1 models"):
        merge(tmp_path, text)  # the base is one of whole models, as in mergekit
    text = text.replace("  encoder: {models: [{model: b}]}\n", "")
    found, stated = merge(tmp_path, text)
    block = "{}.block.{}.layer.0.SelfAttention.q.weight"
    wanted = {n: one[n] for n in one if not n.startswith("decoder.")}
    wanted |= {
        block.format("decoder", n): two[block.format("decoder", min(n, 1))] for n in range(3)
    }
    wanted["decoder.final_layer_norm.weight"] = two["decoder.final_layer_norm.weight"]
    equal(found, wanted)
    assert (stated["num_layers"], stated["num_decoder_layers"]) == (2, 3)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", "text_decoder"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "text_decoder"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "vision_tower"),
        ("model.visual.merger.mlp.0.weight", "multi_modal_projector"),
        ("multi_modal_projector.linear_1.weight", "multi_modal_projector"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder"),
        ("model.decoder.layers.0.fc1.weight", "decoder"),
        ("shared.weight", "shared"),
    ],
)
def test_each_tensor_belongs_to_one_part(name, part):
    parts = ("text_decoder", "vision_tower", "multi_modal_projector")
    if part not in parts:
        parts = ("encoder", "decoder", "shared")
    assert [p for p in parts if belongs_to(name, p)] == [part]


def test_where_tensors_stand():
    before = ("wte.weight", "model.embed_tokens.weight", "embeddings.LayerNorm.bias", "wpe.weight")
    behind = ("embed_out.weight", "lm_head.weight", "model.norm.weight", "pooler.dense.weight")
    assert all(map(stands_before_layers, before))
    assert not any(map(stands_before_layers, behind))
    assert main_stacks(["h.0.mlp.1.w", "h.1.attn.w", "ln_f.weight"]) == ["h"]


def test_the_layers_of_a_decoder_alone_are_counted(tmp_path):
    names = [f"model.decoder.layers.{n}.fc1.weight" for n in range(2)]
    tensors = {n: torch.ones(3, 3) * k for k, n in enumerate([*names, "lm_head.weight"])}
    save(tmp_path / "a", tensors, {"model_type": "opt", "num_hidden_layers": 2})
    text = """
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [0, 2]}]
merge_method: passthrough
"""
    found, stated = merge(tmp_path, text)
    assert stated["num_hidden_layers"] == 4
    assert [int(found[f"model.decoder.layers.{n}.fc1.weight"][0, 0]) for n in range(4)] == [
        0,
        1,
    ] * 2
