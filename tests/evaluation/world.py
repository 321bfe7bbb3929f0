"""Tiny random models of every kind with tokenizers, and files of rows, as users have them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

hf: Any = pytest.importorskip("transformers")

WORDS = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(27))]
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def tokenizer(end: str = " </s>") -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single=f"$A{end}", pair=f"$A{end} $B{end}", special_tokens=[("</s>", 1)]
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def make(kind: str, labels: Sequence[str] = ("no", "maybe", "yes"), seed: int = 0) -> Any:
    """Return a random model."""
    torch.manual_seed(seed)
    names: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }
    text: dict[str, Any] = {"vocab_size": 30, "max_position_embeddings": 24}
    vision: dict[str, Any] = {"image_size": 8, "patch_size": 4}
    if kind == "encoder":
        model = hf.BertModel(hf.BertConfig(**SMALL, **text))
    elif kind == "bert":
        model = hf.BertForSequenceClassification(hf.BertConfig(**SMALL, **text, **names))
    elif kind == "vit":
        model = hf.ViTForImageClassification(hf.ViTConfig(**SMALL, **vision, **names))
    elif kind == "clip":
        model = hf.CLIPModel(
            hf.CLIPConfig(
                text_config={**SMALL, **text, "projection_dim": 12},
                vision_config={**SMALL, **vision, "projection_dim": 12},
                projection_dim=12,
            )
        )
    elif kind == "pyramid":  # a grey picture in, maps out
        stages: dict[str, Any] = {
            "hidden_sizes": [8, 16], "depths": [1, 1], "num_attention_heads": [1, 2],
            "sr_ratios": [1, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2],
        }  # fmt: skip
        model = hf.PvtV2Model(
            hf.PvtV2Config(image_size=8, num_channels=1, num_encoder_blocks=2, **stages)
        )
    elif kind == "t5":
        config = hf.T5Config(
            vocab_size=30, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        model = hf.T5ForConditionalGeneration(config)
    else:
        config = hf.GPT2Config(
            vocab_size=30, n_positions=24, n_embd=16, n_layer=1, n_head=2,
            bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        model = hf.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Far from zero, so that predictions differ between rows.
            parameter.add_(0.4 * torch.randn(parameter.shape))
    return model.eval()


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    if "pixel_values" in str(type(model).main_input_name) or type(model).__name__ == "CLIPModel":
        size = {"height": 8, "width": 8}
        grey = getattr(model.config, "num_channels", 3) == 1
        hf.ViTImageProcessor(size=size, do_normalize=not grey).save_pretrained(folder)
    else:
        tokenizer().save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS[3:], draw.integers(3, 12))) for _ in range(count)]


def jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
    return path


def images(
    folder: Path, count: int, labels: Sequence[str] = ("no", "maybe", "yes"), seed: int = 0
) -> Path:
    draw = np.random.default_rng(seed)
    for i in range(count):
        target = folder / labels[i % len(labels)]
        target.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 255, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(target / f"{i:03d}.png")
    return folder


def tasks(path: Path, **specs: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"tasks": {n: dict(s) for n, s in specs.items()}}))
    return path
