"""Tiny encoders with heads of different width, and texts whose labels are the experts' answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from helpers.configs import tiny_model

WORDS = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(38))]
CLASSES = {"left": 3, "right": 2}
WIDE = {"initializer_range": 0.3}  # far from the tiny default, so that answers differ


def tokenizer() -> hf.PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


def texts(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(
            f"w{int(i)}"
            for i in torch.randint(
                0, 38, (int(torch.randint(4, 12, (1,), generator=generator)),), generator=generator
            )
        )
        for _ in range(count)
    ]


def answers(model: Any, rows: list[str]) -> list[int]:
    words = tokenizer()
    with torch.inference_mode():
        return [int(model.eval()(**words(t, return_tensors="pt")).logits.argmax()) for t in rows]


def build(folder: Path) -> Path:
    """Write `base`, experts `left` and `right`, data, `tasks.yaml` and `heads.yaml`."""
    torch.manual_seed(0)
    base = tiny_model("BertModel", **WIDE)
    base.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    tasks: dict[str, Any] = {}
    for number, (name, classes) in enumerate(CLASSES.items(), 1):
        torch.manual_seed(number)
        model = tiny_model("BertForSequenceClassification", num_labels=classes, **WIDE)
        state = {f"bert.{k}": v + 0.15 * torch.randn_like(v) for k, v in base.state_dict().items()}
        model.load_state_dict(state, strict=False)
        model.classifier.weight.data.normal_(std=2.0)
        model.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
        head = {"weight": torch.randn(classes, 16), "bias": torch.zeros(classes)}
        save_file(head, folder / f"{name}.head.safetensors")
        data = {}
        for shift, split in enumerate(("proxy", "validation", "test")):
            rows: list[dict[str, Any]] = [{"text": t} for t in texts(24, 10 * number + shift)]
            if split != "proxy":
                labels = answers(model, [row["text"] for row in rows])
                rows = [{**row, "label": n} for row, n in zip(rows, labels, strict=True)]
            path = folder / f"{name}.{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            data[split] = path.name
        tasks[name] = {"kind": "text-classification", "data": data}
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    heads = {n: {**task, "head": f"{n}.head.safetensors"} for n, task in tasks.items()}
    (folder / "heads.yaml").write_text(yaml.safe_dump({"tasks": heads}))
    return folder
