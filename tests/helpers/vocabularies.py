"""Small language models whose tokenizers differ, and their merge by naive rules."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH = 5
BODY = "model.layers.0.mlp.up_proj.weight"
EMBED, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"

Tensors = dict[str, Tensor]


def tokenizer_json(words: Sequence[str], added: Sequence[str] = (), special: bool = True) -> dict:
    """Return a `tokenizer.json` of a BPE without merges; added tokens follow the words."""
    rows = {word: row for row, word in enumerate(words)}
    listed = [
        {
            "id": len(words) + n,
            "content": token,
            "special": special,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for n, token in enumerate(added)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": listed,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": rows, "merges": []},
    }


def write_model(
    folder: Path,
    words: Sequence[str],
    added: Sequence[str] = (),
    *,
    rows: int | None = None,
    seed: int = 0,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, object] | None = None,
) -> Tensors:
    """Write a model with a row for every token, or so many; return its tensors."""
    rows = len(words) + len(added) if rows is None else rows
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {EMBED: values(rows, WIDTH), BODY: values(4, WIDTH)}
    if not tied:
        tensors |= {HEAD: values(rows, WIDTH), BIAS: values(rows)}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    stated = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **(config or {}),
    }
    (folder / "config.json").write_text(json.dumps(stated))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1], "bos_token_id": 0})
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(words, added)))
    named = {
        "bos_token": words[0],
        "eos_token": words[1],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return tensors


def rows_by_token(folder: Path) -> dict[str, int]:
    """Return token -> row of a `tokenizer.json`."""
    value = json.loads((folder / "tokenizer.json").read_text())
    return {**value["model"]["vocab"], **{e["content"]: e["id"] for e in value["added_tokens"]}}


def naive_rows(
    name: str,
    order: Sequence[str],
    models: Mapping[str, tuple[Tensors, Mapping[str, int]]],
    weights: Mapping[str, float],
) -> Tensor:
    """Return the rows of the tokens in `order`, merged one by one as base + Σ w_t (own − base).

    `models` are the base and the experts, each with its tensors and the rows of its tokens.
    """

    def row(model: str, token: str) -> Tensor | None:
        tensors, rows = models[model]
        place = rows.get(token)
        held = tensors[name]
        return held[place].double() if place is not None and place < len(held) else None

    merged: list[Tensor] = []
    for token in order:
        own = {model: row(model, token) for model in models}
        having = [value for value in own.values() if value is not None]
        base = own["base"]
        if base is None:
            base = sum(having) / len(having)
        total = base.clone()
        for expert, weight in weights.items():
            value = own[expert]
            total += weight * (0 if value is None else value - base)
        merged.append(total)
    return torch.stack(merged)
