"""Which modules of a decoder read the encoder's states, by the names that libraries give them."""

from __future__ import annotations

import pytest

from eutectic.checkpoint.model_names import reads_encoder


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
