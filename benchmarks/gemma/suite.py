"""The Gemma suite as a record that tables are made from."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]
import json

import torch
from experts import padded, read_rows
from model import Body, find_base, last_states
from table.merging import dense_expert
from table.suite import SPLITS, Batches, Inputs, Suite
from tasks import TASKS
from torch import Tensor, nn

BATCH = 32
GENERAL_BATCH = 4  # the whole vocabulary at every place of a text is large


def load_suite(work: Path, regime: str, count: int) -> Suite:
    """Read what `experts.py` has made of the first tasks."""
    base = find_base(work / "cache")
    model = Body(base).eval()
    tasks = tuple(TASKS)[:count]
    trained = {task: work / regime / task for task in tasks}
    adapters = {t: f for t, f in trained.items() if (f / "adapter_config.json").is_file()}

    def proxies(task: str, seed: int, count: int) -> Batches:
        train = read_rows(work / "tasks" / task / "train.jsonl")
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(train), generator=generator)[:count].tolist()
        return encode([train[i] for i in chosen])

    general = read_rows(work / "tasks" / "general.jsonl")
    return Suite(
        name=f"gemma-{regime}-{count}",
        base=base,
        experts={
            task: dense_expert(base, folder, work / f"{regime}-dense" / task)
            if task in adapters
            else folder
            for task, folder in trained.items()
        },
        adapters=adapters,
        model=model,
        pool=last_states,
        heads={task: head(work, task, model.table) for task in tasks},
        splits={
            task: {s: encode(read_rows(work / "tasks" / task / f"{s}.jsonl")) for s in SPLITS}
            for task in tasks
        },
        layers=("model.layers.*",),
        proxies=proxies,
        general=lambda: {"perplexity": perplexity(model, general)},
    )


def head(work: Path, task: str, table: Tensor) -> nn.Linear:
    """Return the output layer at the label words, or whole where any token may be the answer."""
    words = json.loads((work / "tasks" / task / "task.json").read_text("utf-8"))["tokens"]
    rows = table[torch.tensor(words)] if words else table
    layer = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(rows, requires_grad=False)
    return layer


def encode(rows: list[dict[str, Any]]) -> Batches:
    """Batch prompts by length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["ids"]))
    batches: list[Inputs] = [
        padded([rows[i]["ids"] for i in order[start : start + BATCH]], 0)
        for start in range(0, len(order), BATCH)
    ]
    labels = torch.tensor([row["label"] for row in rows])
    return Batches(batches, torch.tensor(order), labels)


@torch.inference_mode()
def perplexity(model: Body, rows: list[dict[str, Any]]) -> float:
    """Return exp of the mean negative log-likelihood of the tokens after the first."""
    total, count = 0.0, 0
    for start in range(0, len(rows), GENERAL_BATCH):
        inputs = padded([row["ids"] for row in rows[start : start + GENERAL_BATCH]], 0)
        states = model(**inputs).last_hidden_state[:, :-1]
        scores = (states.float() @ model.table.T).transpose(1, 2)
        labels = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)
        losses = nn.functional.cross_entropy(scores, labels, reduction="sum")
        total, count = total + losses.item(), count + int((labels != -100).sum())
    return math.exp(total / count)
