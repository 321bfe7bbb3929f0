"""What names say, by the habits of the common libraries."""

from __future__ import annotations

import pytest

from eutectic.conventions import (
    classification_head,
    is_adapter_part,
    is_table,
    is_table_parameter,
    is_token_embedding,
    layer_group,
    may_be_vocabulary,
    reads_encoder,
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
        ("layers.0.attn.relative_position_bias_table", False, False, False),
    ],
)
def test_three_kinds_of_tables(name: str, table: bool, vocabulary: bool, tokens: bool) -> None:
    assert (is_table(name), may_be_vocabulary(name), is_token_embedding(name)) == (
        table,
        vocabulary,
        tokens,
    )
    assert is_table_parameter("relative_position_bias_table")


def test_a_head_is_named_up_to_its_module() -> None:
    assert classification_head("classifier.weight") == "classifier"
    assert classification_head("distil.pre_classifier.bias") == "distil.pre_classifier"
    assert classification_head("lm_head.weight") is None
    assert classification_head("head") is None  # a bare parameter, not a module


def test_an_adapters_parts_are_known_wherever_they_stand() -> None:
    assert is_adapter_part("lora_A.default.weight")
    assert is_adapter_part("base_model.model.q.lora_B")
    assert not is_adapter_part("base_model.model.q.base_layer.weight")
