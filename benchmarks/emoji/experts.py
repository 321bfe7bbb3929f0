"""Make the experts: the base fine-tuned on each task under a frozen head.

    python benchmarks/emoji/experts.py --work DIR [--task hands …]

The head of a task are prototypes of its classes in the base's features, as in the glyph suite, from
16 pictures a class. Batch norms keep the base's means and variances. Writes
`DIR/heads/<task>.safetensors`, `DIR/hard/<task>/` and there the validation accuracies of base and
expert, `accuracy.json`. Finished tasks are skipped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import torch
from fetch import base
from model import features, load_model, save
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from data import TASKS, build, load_split

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from table.drawings import prototype_head, seeded, write

RATE, STEPS, WARMUP, BATCH = 1.5e-3, 100, 10, 32


def head_of(work: Path, task: str, model: nn.Module) -> dict[str, Tensor]:
    """Return the task's frozen head, making it from the base first if it is missing."""
    path = work / "heads" / f"{task}.safetensors"
    if not path.exists():
        images, labels = load_split(work, task, "train")
        write(prototype_head(features(model, images), labels), path)
    return load_file(path)


def accuracy(model: nn.Module, head: dict[str, Tensor], images: Tensor, labels: Tensor) -> float:
    """Return the share of pictures whose largest logit is their label's."""
    scores = F.linear(features(model, images), head["weight"], head["bias"])
    return (scores.argmax(1) == labels).float().mean().item()


def fine_tune(
    model: nn.Module, head: dict[str, Tensor], task: str, images: Tensor, labels: Tensor,
    rate: float = RATE, steps: int = STEPS,
) -> None:  # fmt: skip
    """Train every parameter of the body, with warm-up and cosine, batch norms in evaluation."""
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - WARMUP, 1))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [WARMUP])
    generator = seeded("fine-tune", task)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        scores = F.linear(model(images[chosen]), head["weight"], head["bias"])
        optimizer.zero_grad()
        F.cross_entropy(scores, labels[chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def make_expert(work: Path, task: str, rate: float = RATE, steps: int = STEPS) -> None:
    """Fine-tune and write one expert, unless it is there."""
    folder = work / "hard" / task
    if folder.exists():
        return
    start = time.monotonic()
    model = load_model(work / "base").to(memory_format=torch.channels_last)
    head = head_of(work, task, model)
    validation = load_split(work, task, "validation")
    record = {"task": task, "base": accuracy(model, head, *validation)}
    fine_tune(model, head, task, *load_split(work, task, "train"), rate, steps)
    record["expert"] = accuracy(model, head, *validation)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    save(model, part)
    (part / "accuracy.json").write_text(json.dumps(record, indent=1) + "\n")
    part.rename(folder)
    print(f"{task:8s} validation: base {record['base']:.3f} expert {record['expert']:.3f} "
          f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--regime", choices=["hard"], default="hard")
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    build(asked.work, asked.task or TASKS)
    base(asked.work)
    for name in asked.task or TASKS:
        make_expert(asked.work, name, asked.rate, asked.steps)
