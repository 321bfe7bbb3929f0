"""The glyph suite as a record that tables are made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from model import load_model
from table.drawings import load_head
from table.suite import SPLITS, Batches, Inputs, Suite
from torch import Tensor

from data import TASKS, load_task

BATCH = 250


def load_suite(work: Path, regime: str, count: int) -> Suite:
    """Read the first tasks, heads and experts that `run.py` made; the one regime is `hard`."""
    if regime != "hard":
        raise SystemExit(f"The glyph suite has no regime {regime!r}; it has 'hard' only.")
    tasks = TASKS[:count]
    data = {task: load_task(work, task) for task in tasks}

    def proxies(task: str, seed: int, count: int) -> Batches:
        images, labels = data[task]["train_images"], data[task]["train_labels"]
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(labels), generator=generator)[:count]
        return batched(images[chosen], labels[chosen])

    return Suite(
        name=f"glyphs-{regime}-{len(tasks)}",
        base=work / "base",
        experts={task: work / "experts" / task for task in tasks},
        model=load_model(work / "base"),
        pool=pool,
        heads={task: load_head(work / "heads" / f"{task}.safetensors") for task in tasks},
        splits={
            task: {s: batched(data[task][f"{s}_images"], data[task][f"{s}_labels"]) for s in SPLITS}
            for task in tasks
        },
        layers=("*",),
        proxies=proxies,
    )


def batched(images: Tensor, labels: Tensor) -> Batches:
    """Return uint8 images [n, 32, 32] as the model's inputs, in order."""
    inputs: list[Inputs] = [
        {"pixel_values": part[:, None].float() / 255} for part in images.split(BATCH)
    ]
    return Batches(inputs, torch.arange(len(labels)), labels)


def pool(outputs: Any, inputs: Inputs) -> Tensor:
    """Mean over positions."""
    return outputs.last_hidden_state.float().mean((2, 3))
