"""What names say, by the habits of the common libraries."""

from __future__ import annotations

import pytest

from eutectic.conventions import (
    classification_head,
    is_adapter_part,
    is_attention_or_mlp_input,
    is_token_embedding,
    layer_group,
    may_be_vocabulary,
    reads_encoder,
)
from eutectic.conventions_tensors import (
    expert_counts,
    holder,
    is_norm_module,
    is_table,
    is_table_parameter,
    is_vectors,
)


@pytest.mark.parametrize(
    "path",
    [
        "decoder.block.0.layer.1.EncDecAttention.k",
        "model.decoder.layers.0.encoder_attn.v_proj",
        "model.decoder.layers.0.encoder_attn.v_proj.base_layer",
        "encoder.layer.0.crossattention.self.key",
        "decoder.transformer.h.0.crossattention.c_attn",
        "enc_to_dec_proj",
    ],
)
def test_keys_values_and_projections_of_the_encoders_states(path: str) -> None:
    assert reads_encoder(path)


@pytest.mark.parametrize(
    "path",
    [
        "decoder.block.0.layer.1.EncDecAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.o",
        "decoder.block.0.layer.0.SelfAttention.k",
        "model.decoder.layers.0.encoder_attn.out_proj",
        "decoder.transformer.h.0.crossattention.q_attn",
        "decoder.transformer.h.0.attn.c_attn",
    ],
)
def test_what_reads_the_decoders_own_states(path: str) -> None:
    assert not reads_encoder(path)


def test_groups_replace_whole_numbers_between_dots_only() -> None:
    assert layer_group("transformer.resblocks.3.mlp.c_fc.weight") == (
        "transformer.resblocks.*.mlp.c_fc.weight"
    )
    assert layer_group("0.weight") == "*.weight"
    assert layer_group("block.1.wi_0.weight") == "block.*.wi_0.weight"


@pytest.mark.parametrize(
    ("name", "table", "vocabulary", "tokens"),
    [
        ("model.embed_tokens.weight", True, True, True),
        ("shared.weight", True, True, True),
        ("mlp.shared_expert.up_proj.weight", False, False, False),
        ("embeddings.position_embeddings.weight", True, True, False),
        ("transformer.wpe.weight", True, False, False),
        ("SelfAttention.relative_attention_bias.weight", True, False, False),
        ("encoder.embedder.layers.0.attn.qkv.weight", False, True, False),
        ("embeddings.projection.weight", False, True, False),
    ],
)
def test_three_kinds_of_tables(name: str, table: bool, vocabulary: bool, tokens: bool) -> None:
    assert (is_table(name), may_be_vocabulary(name), is_token_embedding(name)) == (
        table,
        vocabulary,
        tokens,
    )


@pytest.mark.parametrize(
    ("own", "table", "vectors"),
    [
        ("relative_position_bias_table", True, False),
        ("attention_biases", True, False),
        ("rel_pos_w", True, False),
        ("query_tokens", True, False),
        ("latents_1d", True, False),
        ("cls_token1", True, False),
        ("memory_temporal_positional_encoding", True, False),
        ("pos_bias_u", False, True),
        ("r_w_bias", False, True),
        ("down_proj_bias", False, True),
        ("A_log", False, True),
        ("sinks", False, True),
        ("layer_scale_1", False, True),
        ("time_mix_key", False, True),
        ("x_proj_weight", False, False),
        ("prompts_visual_projection", False, False),
        ("down_proj", False, False),
        ("weight_ih_l0", False, False),
    ],
)
def test_what_a_bare_parameter_is_called(own: str, table: bool, vectors: bool) -> None:
    assert (is_table_parameter(own), is_vectors(own)) == (table, vectors)


def test_a_tensor_is_named_by_its_module_whatever_stands_between() -> None:
    assert holder("weight") == ("weight", "", "")
    assert holder("time_embed.0.weight") == ("weight", "time_embed", "")
    assert holder("conv.weight_v") == ("weight", "conv", "")
    assert holder("a.conv.parametrizations.weight.original0")[0] == "original0"


def test_norms_and_what_projects_from_them() -> None:
    norms = ("q_norm", "LayerNorm", "norm1", "ln_f", "ln_1", "bn2", "grn", "final_layer_norm")
    assert all(is_norm_module(module) for module in norms)
    assert not any(
        is_norm_module(module) for module in ("norm_proj", "in_proj", "kernel", "linear")
    )


def test_numbers_of_experts_are_found_in_every_part_of_a_configuration() -> None:
    config = {
        "num_experts_per_tok": 2,
        "text_config": {"n_routed_experts": 64, "moe_num_experts": [8, 8]},
        "num_local_experts": 4,
    }
    assert sorted(expert_counts(config)) == [4, 64]


@pytest.mark.parametrize(
    ("name", "routed"),
    [
        ("encoder.layers.0.self_attn.linear_q.weight", True),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", True),
        ("blocks.0.attn.q_proj.linear.weight", True),
        ("layers.0.mlp.Wi.weight", True),
        ("layers.0.mlp.fc2.weight", False),
        ("layers.0.self_attn.linear_pos.weight", False),
        ("embeddings.patch_projection.weight", False),
    ],
)
def test_attention_and_the_way_into_an_mlp(name: str, routed: bool) -> None:
    assert is_attention_or_mlp_input(name) is routed


def test_a_head_is_named_up_to_its_module() -> None:
    assert classification_head("classifier.weight") == "classifier"
    assert classification_head("distil.pre_classifier.bias") == "distil.pre_classifier"
    assert classification_head("lm_head.weight") is None
    assert classification_head("head") is None  # a bare parameter, not a module


def test_an_adapters_parts_are_known_wherever_they_stand() -> None:
    assert is_adapter_part("lora_A.default.weight")
    assert is_adapter_part("base_model.model.q.lora_B")
    assert not is_adapter_part("base_model.model.q.base_layer.weight")
