"""Configurations of tiny models, one per architecture: 16 wide, two layers, 40 tokens."""

from __future__ import annotations

from typing import Any

import pytest

# Typed as Any: transformers' own types know less than these calls need.
Model = Any
hf: Any = pytest.importorskip("transformers")

_LAYERS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_TEXT: dict[str, Any] = {**_LAYERS, "vocab_size": 40, "max_position_embeddings": 24}
_IMAGES: dict[str, Any] = {**_LAYERS, "image_size": 8, "patch_size": 4}
_TWO_STACKS: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}

_CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": _TEXT,
    "Roberta": _TEXT,
    "DistilBert": {
        "vocab_size": 40,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 32,
        "max_position_embeddings": 24,
    },
    "T5": {
        "vocab_size": 40,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    },
    "Bart": {
        **_TWO_STACKS,
        "max_position_embeddings": 16,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "decoder_start_token_id": 3,
        "forced_eos_token_id": 3,
    },
    "GPT2": {
        "vocab_size": 40,
        "n_positions": 24,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "Llama": {**_TEXT, "num_key_value_heads": 1},
    "Mamba": {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "Qwen2Moe": {
        **_TEXT,
        "num_key_value_heads": 2,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
    },
    "Mixtral": {
        **_TEXT,
        "num_key_value_heads": 2,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    },
    "DeepseekV3": {
        **_TEXT,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "CLIP": {
        "text_config": {**_TEXT, "projection_dim": 12, "eos_token_id": 39},
        "vision_config": {**_IMAGES, "projection_dim": 12},
        "projection_dim": 12,
    },
    "CLIPVision": {**_IMAGES, "projection_dim": 12},
    "ViT": _IMAGES,
    "Dinov2": {k: v for k, v in _IMAGES.items() if k != "intermediate_size"},
    "Whisper": {
        **_TWO_STACKS,
        "num_mel_bins": 8,
        "max_source_positions": 10,
        "max_target_positions": 12,
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
}


def tiny_config(family: str, **changes: Any) -> Any:
    """Return the configuration of a tiny model; `family` is what transformers' classes start with.

    `changes` replace or add settings.
    """
    return getattr(hf, f"{family}Config")(**{**_CONFIGS[family], **changes})


def tiny_model(name: str, **changes: Any) -> Model:
    """Return a tiny random model of one of transformers' classes, such as `BertModel`."""
    kind = getattr(hf, name)
    family = kind.config_class.__name__.removesuffix("Config")
    return kind(tiny_config(family, **changes))
