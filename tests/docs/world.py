"""The folders that the guides speak of, under their names: tiny checkpoints, data and tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from helpers.configs import tiny_model

WORDS = ["[PAD]", "[UNK]", "</s>", *(f"w{i}" for i in range(37))]
CLASSES = {"sst2": ("negative", "positive"), "mnli": ("entailment", "neutral", "contradiction")}
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def tokenizer() -> Any:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>"
    )
    fast.chat_template = TEMPLATE
    return fast


def texts(count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS[3:], draw.integers(4, 12))) for _ in range(count)]


def rows(path: Path, found: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def build(folder: Path) -> None:
    """Write classifiers of texts, language models, and a CLIP with experts of its own."""
    _classifiers(folder)
    _language_models(folder)
    _pictures(folder)


def _classifiers(folder: Path) -> None:
    """Write `base`, `sst2`, `mnli`, their adapters, data, statistics' data, and `tasks.yaml`."""
    torch.manual_seed(0)
    base = tiny_model("BertModel", initializer_range=0.3)
    base.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    tasks: dict[str, Any] = {}
    for number, (name, classes) in enumerate(CLASSES.items(), 1):
        torch.manual_seed(number)
        names = dict(enumerate(classes))
        model = tiny_model(
            "BertForSequenceClassification",
            num_labels=len(classes),
            id2label=names,
            label2id={label: i for i, label in names.items()},
            initializer_range=0.3,
        )
        state = {f"bert.{k}": v + 0.1 * torch.randn_like(v) for k, v in base.state_dict().items()}
        model.load_state_dict(state, strict=False)
        model.classifier.weight.data.normal_(std=2.0)
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
        _adapter(folder / f"{name}-lora", base, number)
        body = tiny_model("BertModel")
        body.load_state_dict(model.bert.state_dict(), strict=False)
        body.save_pretrained(folder / f"{name}-body")
        tokenizer().save_pretrained(folder / f"{name}-body")
        data: dict[str, Any] = {}
        for shift, split in enumerate(("proxy", "validation", "test")):
            found: list[dict[str, Any]] = [{"text": t} for t in texts(16, 10 * number + shift)]
            if split != "proxy":
                found = [{**row, "label": _answer(model, row["text"], classes)} for row in found]
            rows(folder / "data" / name / f"{split}.jsonl", found)
            data[split] = f"data/{name}/{split}.jsonl"
        proxy = (folder / "data" / name / "proxy.jsonl").read_text()
        for other in (f"{name}-proxy.jsonl", f"{name}.jsonl"):
            (folder / other).write_text(proxy)
        head = {"weight": torch.randn(len(classes), 16), "bias": torch.zeros(len(classes))}
        save_file(head, folder / f"{name}-head.safetensors")
        tasks[name] = {"kind": "text-classification", "data": data}
    _yaml(folder / "tasks.yaml", {"tasks": tasks})
    experts = {name: f"./{name}" for name in CLASSES}
    _yaml(folder / "recipe.yaml", {"base": "./base", "experts": experts, "method": "iso_c"})


def _answer(model: Any, text: str, classes: tuple[str, ...]) -> str:
    with torch.inference_mode():
        logits = model.eval()(**tokenizer()(text, return_tensors="pt")).logits
    return classes[int(logits.argmax())]


def _adapter(folder: Path, base: Any, seed: int, task: str = "FEATURE_EXTRACTION") -> None:
    """Write a LoRA adapter of rank 2 on every attention projection."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in base.state_dict().items():
        module = name.removesuffix(".weight")
        if module.endswith(("query", "value", "q_proj", "v_proj")) and weight.ndim == 2:
            shapes = {"lora_A": (2, weight.shape[1]), "lora_B": (weight.shape[0], 2)}
            for factor, shape in shapes.items():
                values = 0.3 * torch.randn(shape, generator=generator)
                tensors[f"base_model.model.{module}.{factor}.weight"] = values
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    stated = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "task_type": task,
        "base_model_name_or_path": "base" if task == "FEATURE_EXTRACTION" else "llm",
        "target_modules": sorted({n.split(".")[-3] for n in tensors}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(stated))


def _language_models(folder: Path) -> None:
    """Write `llm`, `math`, `code`, adapters of both, prompts, `llm-tasks.yaml`."""
    torch.manual_seed(5)
    base = tiny_model("LlamaForCausalLM", initializer_range=0.2, eos_token_id=2)
    tasks: dict[str, Any] = {}
    for number, name in enumerate(("llm", "math", "code")):
        model = tiny_model("LlamaForCausalLM", eos_token_id=2)
        generator = torch.Generator().manual_seed(number)
        state = {
            k: v + 0.05 * (number > 0) * torch.randn(v.shape, generator=generator)
            for k, v in base.state_dict().items()
        }
        model.load_state_dict(state)
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
        if number:
            _adapter(folder / f"{name}-lora", base, number, "CAUSAL_LM")
            for shift, split in enumerate(("proxy", "validation", "test")):
                found = [{"text": t} for t in texts(8, 70 + 10 * number + shift)]
                rows(folder / "data" / name / f"{split}.jsonl", found)
            splits = {s: f"data/{name}/{s}.jsonl" for s in ("proxy", "validation", "test")}
            tasks[name] = {"kind": "language-model", "data": splits}
    _yaml(folder / "llm-tasks.yaml", {"tasks": tasks})


def _pictures(folder: Path) -> None:
    """Write `clip`, `cars`, `signs`, and a folder of pictures for each."""
    from PIL import Image

    torch.manual_seed(9)
    base = tiny_model("CLIPModel", initializer_range=0.2)
    base.config.text_config.eos_token_id = 2
    for number, name in enumerate(("clip", "cars", "signs")):
        model = tiny_model("CLIPModel")
        generator = torch.Generator().manual_seed(number)
        noise = 0.05 * (number > 0)
        model.load_state_dict(
            {
                k: v + noise * torch.randn(v.shape, generator=generator)
                if v.is_floating_point()
                else v
                for k, v in base.state_dict().items()
            }
        )
        model.config.text_config.eos_token_id = 2
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
        size = {"height": 8, "width": 8}
        hf.ViTImageProcessor(size=size).save_pretrained(folder / name)
        for shift, split in enumerate(("train", "test") if number else ()):
            draw = np.random.default_rng(10 * number + shift)
            for i in range(6):
                target = folder / "data" / name / split / WORDS[3 + i % 2]
                target.mkdir(parents=True, exist_ok=True)
                pixels = draw.integers(0, 255, (10, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(target / f"{i}.png")
    kind = "zero-shot-image-classification"
    tasks = {
        name: {
            "kind": kind,
            "data": {"proxy": f"data/{name}/train", "test": f"data/{name}/test"},
            "prompts": ["{}"],
        }
        for name in ("cars", "signs")
    }
    _yaml(folder / "clip-tasks.yaml", {"tasks": tasks})


def _yaml(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(value), sort_keys=False))
