"""Which treatment a tensor takes, from its name, shape and type.

Guards the default rules, their order, and the layouts (transposed, stacked, fused) that follow.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.reader import StateDictReader
from eutectic.planning.tied_groups import equal_tensors
from eutectic.planning.treatment import Decision, decide
from eutectic.recipes.schema import TensorRule
from eutectic.types import Treatment


def entry(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> TensorEntry:
    return TensorEntry(name, dtype, shape, "model.safetensors", 0, 0)


def decided(found: TensorEntry, *rules: dict[str, Any], **config: Any) -> Decision:
    decision = decide(found, [TensorRule(**rule) for rule in rules], config)
    assert isinstance(decision, Decision), decision
    return decision


@pytest.mark.parametrize(
    ("name", "shape", "treatment"),
    [
        ("layer.bias", (8,), "vector"),
        ("logit_scale", (), "vector"),
        ("gone.weight", (0, 4), "copy"),
        ("layer.weight", (8, 4), "matrix"),
        ("router.weight", (1, 4), "vector"),
        ("embed_tokens.weight", (8, 4), "embedding"),
        ("transformer.wte.weight", (8, 4), "embedding"),
        ("shared.weight", (8, 4), "embedding"),
        ("mlp.shared_expert.up_proj.weight", (8, 4), "matrix"),
        ("self_attention.relative_attention_bias.weight", (32, 4), "embedding"),
        ("cls_token", (1, 1, 4), "embedding"),
        ("pos_embed", (1, 5, 4), "embedding"),
        ("conv.weight", (8, 4, 3), "conv"),
        ("patch_embed.proj.weight", (8, 3, 4, 4), "conv"),
        ("mlp.experts.down_proj", (3, 8, 4), "matrix"),
        ("text_projection.weight", (8, 4), "vector"),
        ("lm_head.weight", (8, 4), "matrix"),
        ("embed_out.weight", (8, 4), "matrix"),
        ("experts.gate_up_proj_bias", (3, 8), "vector"),
        ("self_attn.sinks", (1, 8), "vector"),
        ("mixer.A_log", (8, 4), "vector"),
        ("self_attn.pos_bias_u", (8, 4), "vector"),
        ("self_attn.q_norm.weight", (8, 4), "vector"),
        ("block.layer_scale.gamma", (8, 1, 1), "vector"),
        ("conv.parametrizations.weight.original0", (8, 1, 1), "vector"),
        ("conv.parametrizations.weight.original1", (8, 4, 3), "conv"),
        ("dense.parametrizations.weight.original1", (8, 4), "matrix"),
        ("attn.relative_position_bias_table", (49, 4), "embedding"),
        ("attn.rel_pos_h", (27, 4), "embedding"),
        ("resampler.latents", (8, 4), "embedding"),
        ("pos_embed", (1, 4, 7, 7), "embedding"),
        ("embedder.layers.0.attn.qkv.weight", (12, 4), "matrix"),
        ("vision.embeddings.patch_embedding.weight", (8, 12), "matrix"),
        ("embedding_hidden_mapping_in.weight", (8, 4), "matrix"),
        ("embeddings_project.weight", (8, 4), "matrix"),
        ("embedder.conv1.weight", (8, 4, 7), "conv"),
        ("head.weight", (4, 32, 64), "matrix"),
        ("rg_lru.input_gate_weight", (4, 8, 8), "matrix"),
        ("time_embed.0.weight", (8, 4), "matrix"),
        ("embed_timestep.weight", (8, 4), "embedding"),
        ("filters.weight", (64, 64, 15), "conv"),
        ("pos_conv_embed.conv.weight", (64, 48, 128), "conv"),
    ],
)
def test_defaults(name: str, shape: tuple[int, ...], treatment: str) -> None:
    assert decided(entry(name, *shape)).treatment.value == treatment


def test_the_bias_beside_a_weight_tells_a_linear_layer_from_a_table() -> None:
    def with_bias(found: TensorEntry, *shape: int) -> str:
        bias = entry(found.name.replace("weight", "bias"), *shape)
        decision = decide(found, [], {}, {bias.name: bias, found.name: found})
        assert isinstance(decision, Decision)
        return decision.treatment.value

    for name in ("time_embed.0.weight", "bbox_embed.layers.1.weight", "reference_points.weight"):
        assert with_bias(entry(name, 8, 4), 8) == "matrix"
    assert decided(entry("reference_points.weight", 8, 4)).treatment.value == "embedding"
    assert with_bias(entry("mixing.weight", 8, 16, 16), 8, 16) == "matrix"
    assert with_bias(entry("mixing.weight", 8, 16, 16), 8) == "conv"
    assert with_bias(entry("ups.weight", 64, 32, 40), 64) == "conv"
    assert with_bias(entry("affine.weight", 1, 1, 1, 8), 1, 1, 1, 8) == "vector"
    assert with_bias(entry("style_norm.weight", 8, 4), 8) == "matrix"


@pytest.mark.parametrize(
    ("name", "shape", "config"),
    [
        ("layers.0.block_sparse_moe.input_linear.weight", (4, 32, 16), {}),
        ("layers.0.mlp.output_linear.weight", (4, 16, 32), {}),  # JetMoE
        ("layers.0.mixture.w_in.weight", (4, 32, 16), {"num_local_experts": 4}),
        ("layers.0.mixture.w_in.weight", (4, 32, 16), {"text_config": {"n_routed_experts": 4}}),
        ("depth_decoder.codebooks_head.weight", (31, 128, 2051), {}),
    ],
)
def test_stacks_of_linear_maps_are_merged_one_by_one(
    name: str, shape: tuple[int, ...], config: dict[str, Any]
) -> None:
    decision = decided(entry(name, *shape), **config)
    assert (decision.treatment.value, decision.layout.stacked) == ("matrix", True)


def test_a_map_whose_heads_have_an_axis_is_one_map() -> None:
    decision = decided(entry("layer.0.rel_attn.q", 16, 4, 8))
    assert (decision.treatment.value, decision.layout.stacked) == ("matrix", False)


def test_integers_are_copied_whatever_their_name() -> None:
    assert decided(entry("layer.weight", 8, 4, dtype=torch.int64)).treatment.value == "copy"


def test_the_first_rule_that_says_something_decides() -> None:
    rules = [
        {"match": "*.weight", "scale": 0.5},
        {"match": "a.*", "treatment": "copy", "scale": 2.0},
        {"match": "*", "treatment": "vector", "split": 2},
    ]
    decision = decided(entry("a.weight", 8, 4), *rules)
    assert (decision.treatment.value, decision.scale, decision.layout.split) == ("copy", 0.5, ())
    assert decided(entry("b.bias", 8), *rules).scale is None


def test_conv1d_is_transposed_in_its_models_alone() -> None:
    found = entry("h.0.attn.c_attn.weight", 4, 12)
    assert decided(found, model_type="gpt2").layout.transpose
    assert not decided(found, model_type="llama").layout.transpose
    assert not decided(entry("h.0.mlp.gate.weight", 4, 12), model_type="gpt2").layout.transpose


@pytest.mark.parametrize(
    ("found", "config", "heights"),
    [
        (entry("qkv.weight", 12, 5), {}, (4, 4, 4)),
        (entry("h.0.attn.c_attn.weight", 5, 12), {"model_type": "gpt2"}, (4, 4, 4)),
        (entry("experts.gate_up_proj", 2, 12, 5), {}, (4, 4, 4)),
        (entry("conv.weight", 12, 5, 3), {}, (4, 4, 4)),
        (entry("conv.weight", 12, 5, 2, 2), {}, (4, 4, 4)),
    ],
)
def test_a_fused_tensor_is_cut_along_its_outputs(
    found: TensorEntry, config: dict[str, Any], heights: tuple[int, ...]
) -> None:
    rule = {"match": "*", "treatment": "matrix", "split": 3}
    assert decided(found, rule, **config).layout.split == heights
    wrong = decide(found, [TensorRule(match="*", treatment=Treatment.MATRIX, split=5)], config)
    assert str(wrong) == f"{found.name}: 12 rows cannot be split into 5 equal parts."
    wrong = decide(found, [TensorRule(match="*", treatment=Treatment.MATRIX, split=[4, 4])], config)
    assert str(wrong) == f"{found.name}: split [4, 4] adds up to 8, the tensor has 12 rows."


def test_rows_of_a_stack_are_its_last_axis_where_a_model_keeps_inputs_first() -> None:
    found, rule = entry("experts.gate_up_proj", 2, 5, 12), {"match": "*", "split": 2}
    layout = decided(found, rule, model_type="llama4").layout
    assert (layout.transpose, layout.stacked, layout.split) == (True, True, (6, 6))
    assert not decided(found, model_type="llama4").layout.transpose


def test_experts_below_each_other_in_one_matrix_are_merged_apart() -> None:
    config = {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 4}}
    found = entry("transformer.blocks.0.ffn.experts.mlp.v1", 32, 6)
    assert decided(found, **config).layout.split == (8, 8, 8, 8)
    assert decided(found, {"match": "*", "split": [16, 16]}, **config).layout.split == (16, 16)
    assert decided(found).layout.split == ()


def test_rules_that_cannot_be() -> None:
    matrix = [TensorRule(match="*", treatment=Treatment.MATRIX)]
    assert "needs 2 dimensions" in str(decide(entry("b", 4), matrix, {}))
    vector = [TensorRule(match="*", treatment=Treatment.VECTOR)]
    assert "cannot be merged" in str(decide(entry("b", 4, dtype=torch.int64), vector, {}))


def test_tables_that_are_stored_twice_are_recognised() -> None:
    table = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    held = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone(), "w": table}
    assert equal_tensors(StateDictReader(held)) == [["model.embed_tokens.weight", "lm_head.weight"]]
    late = table.clone()
    late[50, 3] += 1  # in no sample
    for other in (table + 1, late):
        untied = {"model.embed_tokens.weight": table, "lm_head.weight": other}
        assert [len(names) for names in equal_tensors(StateDictReader(untied))] == [1, 1]
