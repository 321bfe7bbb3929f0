"""The text suite as a record that tables are made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bases import MINILM, Base
from confirmation import named_tasks
from experts import load_head
from table.merging import dense_expert
from table.suite import SPLITS, Batches, Inputs, Suite
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

BATCH = 64


def load_suite(work: Path, regime: str, count: int, base: Base = MINILM) -> Suite:
    """Read what `experts.py` has made: the first tasks, or the miniature's if `count` is six.

    For none, those of the confirmation.
    """
    trained = {task: work / regime / task for task in named_tasks(count)}
    name = f"{base.name}-{regime}-{len(trained) if count else 'confirmation'}"
    return suite_of(name, work, trained, base)


def suite_of(name: str, work: Path, trained: Mapping[str, Path], base: Base = MINILM) -> Suite:
    """Read experts of any regimes: task -> folder of its expert."""
    tasks = tuple(trained)
    found = base.find(work / "cache")
    tokenizer = AutoTokenizer.from_pretrained(found, local_files_only=True)
    model = AutoModel.from_pretrained(
        found, local_files_only=True, add_pooling_layer=False, dtype=torch.float32
    ).eval()
    folders = {task: work / "tasks" / task for task in tasks}
    recipes = [json.loads((f / "expert.json").read_text("utf-8")) for f in trained.values()]
    max_tokens = max(recipe["recipe"]["max_tokens"] for recipe in recipes)
    adapters = {t: f for t, f in trained.items() if (f / "adapter_config.json").is_file()}

    def rows(task: str, split: str) -> list[dict[str, Any]]:
        lines = (work / "tasks" / task / f"{split}.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def proxies(task: str, seed: int, count: int) -> Batches:
        train = rows(task, "train")
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(train), generator=generator)[:count].tolist()
        return encode(tokenizer, [train[i] for i in chosen], max_tokens)

    return Suite(
        name=name,
        base=found,
        experts={
            task: dense_expert(found, folder, work / f"{folder.parent.name}-dense" / task)
            if task in adapters
            else folder
            for task, folder in trained.items()
        },
        adapters=adapters,
        model=model,
        pool=pool,
        heads={task: load_head(folder / "head.safetensors") for task, folder in folders.items()},
        splits={
            task: {split: encode(tokenizer, rows(task, split), max_tokens) for split in SPLITS}
            for task in tasks
        },
        layers=("encoder.*",),
        proxies=proxies,
    )


def encode(tokenizer: Any, rows: list[dict[str, Any]], max_tokens: int) -> Batches:
    """Tokenise and batch by length."""
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_tokens)
    order = sorted(range(len(rows)), key=lambda i: len(ids["input_ids"][i]))
    batches: list[Inputs] = []
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        picked = {"input_ids": [ids["input_ids"][i] for i in chosen]}
        batches.append(dict(tokenizer.pad(picked, return_tensors="pt")))
    labels = torch.tensor([row["label"] for row in rows])
    return Batches(batches, torch.tensor(order), labels)


def pool(outputs: Any, inputs: Inputs) -> Tensor:
    """Mean over the tokens that are not padding."""
    states: Tensor = outputs.last_hidden_state.float()
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    return (states * mask).sum(1) / mask.sum(1)
