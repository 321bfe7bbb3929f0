"""Tiny random models of many architectures, made and saved by transformers as users do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Typed as Any: transformers' own types know less than these calls need.
Model = Any
hf: Any = pytest.importorskip("transformers")


def _bert() -> Model:
    return hf.BertForMaskedLM(hf.BertConfig(**_ENCODER, max_position_embeddings=24))


def _roberta() -> Model:
    return hf.RobertaForMaskedLM(hf.RobertaConfig(**_ENCODER, max_position_embeddings=24))


def _distilbert() -> Model:
    config = hf.DistilBertConfig(
        vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=24
    )
    return hf.DistilBertForMaskedLM(config)


def _t5(feed_forward: str, tied: bool) -> Model:
    config = hf.T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj=feed_forward,
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config)


def _gpt2() -> Model:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=40, n_positions=24, n_embd=16, n_layer=2, n_head=2)
    )


def _llama() -> Model:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER, num_key_value_heads=1))


def _qwen2_moe() -> Model:
    config = hf.Qwen2MoeConfig(
        **_DECODER,
        num_key_value_heads=2,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=16,
    )
    return hf.Qwen2MoeForCausalLM(config)


def _mixtral() -> Model:
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            **_DECODER, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2
        )
    )


def _deepseek_v3() -> Model:
    config = hf.DeepseekV3Config(
        **_DECODER,
        num_key_value_heads=2,
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )
    return hf.DeepseekV3ForCausalLM(config)


def _clip() -> Model:
    text = {**_ENCODER, "max_position_embeddings": 24, "projection_dim": 12, "eos_token_id": 39}
    vision = {**_VISION, "projection_dim": 12}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))


def _vit() -> Model:
    return hf.ViTModel(hf.ViTConfig(**_VISION))


def _dinov2() -> Model:
    return hf.Dinov2Model(
        hf.Dinov2Config(**{k: v for k, v in _VISION.items() if k != "intermediate_size"})
    )


def _whisper() -> Model:
    config = hf.WhisperConfig(
        vocab_size=40,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=10,
        max_target_positions=12,
        decoder_start_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return hf.WhisperForConditionalGeneration(config)


_ENCODER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_DECODER: dict[str, Any] = {**_ENCODER, "max_position_embeddings": 32}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}

ZOO: dict[str, Callable[[], Model]] = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "t5-relu": lambda: _t5("relu", True),
    "t5-gated": lambda: _t5("gated-gelu", False),
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen2-moe": _qwen2_moe,
    "mixtral": _mixtral,
    "deepseek-v3": _deepseek_v3,
    "clip": _clip,
    "vit": _vit,
    "dinov2": _dinov2,
    "whisper": _whisper,
}


def make_model(kind: str, seed: int = 0) -> Model:
    """Return a random model of an architecture, in evaluation mode."""
    torch.manual_seed(seed)
    return ZOO[kind]().eval()


def perturb(model: Model, seed: int, size: float = 0.02) -> Model:
    """Add noise to every parameter in place; ties between parameters stay ties."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * size
            parameter.add_(noise.to(parameter.dtype))
    return model


def save_family(
    kind: str, folder: Path, experts: int, *, dtype: torch.dtype, shard: str | None = None
) -> tuple[Path, dict[str, Path]]:
    """Save a base and experts of it by `save_pretrained`; return their folders."""
    options = {} if shard is None else {"max_shard_size": shard}
    base = folder / "base"
    make_model(kind).to(dtype).save_pretrained(base, **options)
    paths: dict[str, Path] = {}
    for i in range(experts):
        paths[f"e{i}"] = folder / f"e{i}"
        perturb(make_model(kind), 100 + i).to(dtype).save_pretrained(paths[f"e{i}"], **options)
    return base, paths


def forward(kind: str, model: Model) -> list[torch.Tensor]:
    """Return the floating outputs of one forward pass on fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 39, (2, 7), generator=generator)
    dtype = next(model.parameters()).dtype
    pixels = torch.randn(2, 3, 8, 8, generator=generator).to(dtype)
    inputs: dict[str, Any] = {"input_ids": ids}
    if kind.startswith("t5"):
        inputs["decoder_input_ids"] = ids
    elif kind == "clip":
        inputs["pixel_values"] = pixels
    elif kind in ("vit", "dinov2"):
        inputs = {"pixel_values": pixels}
    elif kind == "whisper":
        mel = torch.randn(2, 8, 20, generator=generator).to(dtype)
        inputs = {"input_features": mel, "decoder_input_ids": ids}
    with torch.no_grad():
        output = model(**inputs)
    return [t for t in output.to_tuple() if isinstance(t, torch.Tensor) and t.is_floating_point()]
