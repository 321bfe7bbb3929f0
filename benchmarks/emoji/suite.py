"""The emoji suite as a record that tables are made from."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]
import torch
from model import load_model
from table.drawings import load_head
from table.suite import SPLITS, Batches, Inputs, Suite
from torch import Tensor

from data import TASKS, load_split

BATCH = 25  # larger ones leave the caches


def load_suite(work: Path, regime: str, count: int) -> Suite:
    """Read what `experts.py` has made of the first tasks; the one regime is `hard`."""
    if regime != "hard":
        raise SystemExit(f"The emoji suite has no regime {regime!r}; it has 'hard' only.")
    tasks = TASKS[:count]

    def proxies(task: str, seed: int, count: int) -> Batches:
        images, labels = load_split(work, task, "train")
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(labels), generator=generator)[:count]
        return batched(images[chosen], labels[chosen])

    return Suite(
        name=f"emoji-{regime}-{len(tasks)}",
        base=work / "base",
        experts={task: work / regime / task for task in tasks},
        model=load_model(work / "base").to(memory_format=torch.channels_last),
        pool=pooled,
        heads={task: load_head(work / "heads" / f"{task}.safetensors") for task in tasks},
        splits={task: {s: batched(*load_split(work, task, s)) for s in SPLITS} for task in tasks},
        layers=("*",),
        proxies=proxies,
        convolutions=True,
    )


def batched(images: Tensor, labels: Tensor) -> Batches:
    """Return uint8 pictures `[n, 3, h, w]` as the model's inputs, in order."""
    inputs: list[Inputs] = [{"pixel_values": part} for part in images.split(BATCH)]
    return Batches(inputs, torch.arange(len(labels)), labels)


def pooled(outputs: Tensor, inputs: Inputs) -> Tensor:
    """Return the features, which are means over places already."""
    return outputs
