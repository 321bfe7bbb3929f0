"""Tiny language models of six architectures, fine-tunes of them, and adapters, on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LAYERS = 4
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"head_dim": 8}),
    "qwen2": ("Qwen2Config", {}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 3, "num_experts_per_tok": 2}),
}
EXTRA = {"tok_a": ["<|a_start|>", "<|a_end|>"], "tok_b": ["<|b_start|>", "<|a_end|>", "<|b_end|>"]}


def make_family(folder: Path, kind: str) -> None:
    """Write `base`, `a`, `b`, `c` of one architecture, in float32."""
    name, more = KINDS[kind]
    config = getattr(transformers, name)(**SIZES, **more)
    torch.manual_seed(sum(map(ord, kind)))
    base = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in base.parameters():  # biases and norms are not trivial
        parameter.data += 0.02 * torch.randn_like(parameter)
    tokenizer = _tokenizer(SIZES["vocab_size"])
    for place, who in enumerate(("base", "a", "b", "c")):
        model = base if who == "base" else _tuned(base, seed=place)
        model.save_pretrained(folder / who)
        tokenizer.save_pretrained(folder / who)


def make_tokens(folder: Path) -> None:
    """Write Llamas whose vocabularies differ: `base`, `tok_a`, `tok_b` with tokens of their own."""
    torch.manual_seed(7)
    base = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES))
    base.save_pretrained(folder / "base")
    _tokenizer(SIZES["vocab_size"]).save_pretrained(folder / "base")
    for place, (who, added) in enumerate(EXTRA.items()):
        model = _tuned(base, seed=40 + place)
        tokenizer = _tokenizer(SIZES["vocab_size"])
        tokenizer.add_tokens([transformers.AddedToken(t, special=True) for t in added])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.save_pretrained(folder / who)
        tokenizer.save_pretrained(folder / who)


def make_half(folder: Path, source: Path) -> None:
    """Write a family in bfloat16."""
    for who in ("base", "a", "b"):
        model = transformers.AutoModelForCausalLM.from_pretrained(source / who)
        model.to(torch.bfloat16).save_pretrained(folder / who)


def make_adapter(folder: Path, source: Path) -> None:
    """Write a LoRA of a family's `a`."""
    import peft

    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_pretrained(source / "a")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    tuned = peft.get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(folder)


def make_all(folder: Path) -> None:
    """Write everything that the recipes read."""
    if (folder / "made.json").exists():
        return
    transformers.logging.set_verbosity_error()
    for kind in KINDS:
        make_family(folder / kind, kind)
    make_tokens(folder / "tokens")
    make_half(folder / "half", folder / "llama")
    make_adapter(folder / "lora", folder / "llama")
    (folder / "made.json").write_text(json.dumps({"transformers": transformers.__version__}))


def _tuned(base: transformers.PreTrainedModel, seed: int) -> transformers.PreTrainedModel:
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for parameter in model.parameters():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def _tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """Return a byte-pair tokenizer of `size` tokens, three of them special."""
    special = ["<unk>", "<s>", "</s>"]
    alphabet = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*special, *alphabet, "Ġ"]
    pairs = [(a, b) for a in "theaoin" for b in "hrnsetd"]
    merges = pairs[: size - len(words)]
    words += [a + b for a, b in merges]
    model = models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
