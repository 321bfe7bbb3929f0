"""Tiny random models of many architectures, made and saved by transformers as users do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from helpers.configs import Model, tiny_model

# kind -> class of transformers, changes of its configuration
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", {}),
    "roberta": ("RobertaForMaskedLM", {}),
    "distilbert": ("DistilBertForMaskedLM", {}),
    "t5-relu": ("T5ForConditionalGeneration", {"tie_word_embeddings": True}),
    "t5-gated": (
        "T5ForConditionalGeneration",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "gpt2": ("GPT2LMHeadModel", {}),
    "llama": ("LlamaForCausalLM", {}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", {}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", {}),
    "clip": ("CLIPModel", {}),
    "vit": ("ViTModel", {}),
    "dinov2": ("Dinov2Model", {}),
    "whisper": ("WhisperForConditionalGeneration", {}),
}


def make_model(kind: str, seed: int = 0) -> Model:
    """Return a random model of an architecture, in evaluation mode."""
    torch.manual_seed(seed)
    name, changes = ZOO[kind]
    return tiny_model(name, **changes).eval()


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
