"""Tiny models of several architectures, saved as a base, a merge of it and experts; and inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.configs import tiny_model

CLASSES = {
    "bert": "BertModel",
    "bert_classifier": "BertForSequenceClassification",
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "clip_vision": "CLIPVisionModelWithProjection",
    "clip": "CLIPModel",
    "mixtral": "MixtralForCausalLM",
}
# Tables that no layer multiplies by keep the merged values: experts share them here.
_TABLES = ("embeddings.weight", "embed_tokens", "shared", "wte", "wpe", "token", "relative")
_TABLES += ("position", "embed_positions", "lm_head", "class_embedding", "logit_scale")


def make(kind: str, expert: int = 0) -> Any:
    """Return the base (0) or an expert of it, which moved everything but its tables."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"tie_word_embeddings": True} if kind == "t5" else {}
    model = tiny_model(CLASSES[kind], **options).eval()
    generator = torch.Generator().manual_seed(expert)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
            if expert and not any(table in name for table in _TABLES):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def save_world(kind: str, folder: Path, experts: str = "ab") -> Path:
    """Save `base`, experts and `merged`, their average."""
    model = make(kind)
    model.save_pretrained(folder / "base")
    made = [make(kind, i) for i in range(1, len(experts) + 1)]
    for name, expert in zip(experts, made, strict=True):
        expert.save_pretrained(folder / name)
    with torch.no_grad():
        parts = [dict(expert.named_parameters()) for expert in made]
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.stack([own[name] for own in parts]).mean(0))
    model.save_pretrained(folder / "merged")
    return folder


def inputs(kind: str, seed: int = 0, count: int = 6, size: int = 8) -> list[dict[str, Tensor]]:
    """Return padded batches: enough tokens to determine every layer."""
    generator = torch.Generator().manual_seed(seed)
    found: list[dict[str, Tensor]] = []
    for _ in range(count):
        pixels = torch.randn(size, 3, 8, 8, generator=generator)
        ids = torch.randint(4, 39, (size, 10), generator=generator)
        mask = torch.ones_like(ids)
        mask[: size // 2, 7:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if kind in ("t5", "bart"):
            batch["labels"] = torch.randint(4, 39, (size, 6), generator=generator)
        if kind in ("vit", "clip_vision", "dinov2"):
            batch = {"pixel_values": pixels}
        if kind == "clip":
            batch["pixel_values"] = pixels
        found.append(batch)
    return found


def outputs(kind: str, model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return the floating outputs where tokens count."""
    with torch.no_grad():
        found = model(**batch)
    mask = batch.get("attention_mask")
    kept = [t for t in found.to_tuple() if isinstance(t, Tensor) and t.is_floating_point()]
    kept = [t for t in kept if t.ndim > 0]
    if mask is not None:
        kept = [t[mask.bool()] if t.shape[:2] == mask.shape else t for t in kept]
    return kept


def load(kind: str, folder: Path) -> Any:
    import transformers as hf

    return getattr(hf, CLASSES[kind]).from_pretrained(folder).eval()
