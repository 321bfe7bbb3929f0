"""The order of a model's tensors, whatever order their names were in."""

import random

import pytest

from eutectic.conventions_order import in_model_order

LLAMA = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{n}.{part}.weight"
        for n in (0, 1, 9, 10)
        for part in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    ),
    "lm_head.weight",
]
BERT = [
    "embeddings.word_embeddings.weight",
    *(
        f"encoder.layer.{n}.{part}.weight"
        for n in (2, 11)
        for part in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    ),
    "pooler.dense.weight",
]
T5 = [
    "shared.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "encoder.block.0.layer.0.SelfAttention.o.weight",
    "encoder.block.0.layer.1.DenseReluDense.wi.weight",
    "encoder.block.0.layer.1.DenseReluDense.wo.weight",
    "decoder.block.0.layer.0.SelfAttention.q.weight",
    "decoder.block.0.layer.1.EncDecAttention.q.weight",
    "decoder.block.0.layer.2.DenseReluDense.wi.weight",
    "lm_head.weight",
]
MIXTURE = [
    "layers.0.self_attn.q_proj.weight",
    "layers.0.mlp.gate.weight",
    "layers.0.mlp.experts.3.w1.weight",
    "layers.0.mlp.experts.3.w2.weight",
    "layers.0.mlp.experts.10.w1.weight",
]
SWIN = [
    "encoder.layers.0.blocks.0.attention.self.query.weight",
    "encoder.layers.0.blocks.0.output.dense.weight",
    "encoder.layers.0.blocks.1.attention.self.query.weight",
    "encoder.layers.1.blocks.0.attention.self.query.weight",
]
PARTS = ["h.0.attn.c_attn.weight[0]", "h.0.attn.c_attn.weight[1]", "h.0.mlp.c_fc.weight"]


@pytest.mark.parametrize("names", [LLAMA, BERT, T5, MIXTURE, SWIN, PARTS])
def test_from_input_to_output(names: list[str]):
    for seed in range(5):
        mixed = random.Random(seed).sample(names, len(names))
        assert in_model_order(mixed) == names


def test_towers_keep_the_order_in_which_they_are_met():
    text, image = "text_model.layers.0.mlp.fc1.weight", "vision_model.layers.0.mlp.fc1.weight"
    assert in_model_order([image, text]) == [image, text]
    assert in_model_order([text, image]) == [text, image]
