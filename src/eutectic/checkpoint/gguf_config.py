"""The configuration of a GGUF file's model, as transformers would have it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eutectic.checkpoint.gguf_file import GgufHeader
from eutectic.conventions_gguf import ARCHITECTURES, Architecture
from eutectic.errors import CheckpointError, suggest

# Key of the configuration -> key of the file's settings.
_KEYS: Mapping[str, str] = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_GPT2_KEYS: Mapping[str, str] = {
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}


def architecture_of(header: GgufHeader, where: Path) -> Architecture:
    """Return the architecture of a file; CheckpointError for one that is not known here.

    Mistral's and Mixtral's models are called llama in GGUF; experts tell the latter.
    """
    name = str(header.settings.get("general.architecture"))
    if name == "llama" and header.setting("expert_count"):
        name = "mixtral"
    found = ARCHITECTURES.get(name)
    if found is None:
        raise CheckpointError(
            f"{where}: GGUF files of the architecture '{name}' are not read; known are "
            f"{', '.join(ARCHITECTURES)}.{suggest(name, list(ARCHITECTURES))}\n"
            "Name the checkpoint that it was made from."
        )
    return found


def config_of(header: GgufHeader, architecture: Architecture, tied: bool) -> dict[str, Any]:
    """Return the configuration that a file's settings state."""
    gpt2 = architecture.model_type == "gpt2"
    config: dict[str, Any] = {
        "architectures": [architecture.model],
        "model_type": architecture.model_type,
        "tie_word_embeddings": tied,
    }
    for key, setting in (_GPT2_KEYS if gpt2 else _KEYS).items():
        value = header.setting(setting)
        if value is not None and not isinstance(value, list):
            config[key] = value
    table = next((t for t in header.tensors if t.name == "token_embd.weight"), None)
    if table is not None and table.shape:
        config["vocab_size"] = table.shape[0]
    if architecture.model_type in ("qwen2_moe", "qwen3_moe") and "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    return config
