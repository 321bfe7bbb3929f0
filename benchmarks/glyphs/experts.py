"""Make the experts: the base fine-tuned on each task under a frozen head.

    python benchmarks/glyphs/experts.py --work DIR [--task mnist …]

The head of a task are prototypes of its classes in the base's features, from 16 images a class; it
stays frozen, and base, experts and merges all use it. It plays the part of a zero-shot head made of
class names: the base does the task, but far from as well as an expert. Writes
`DIR/heads/<task>.safetensors`, `DIR/experts/<task>/` and the test accuracies of base and expert in
`DIR/experts/<task>/accuracy.json`. Finished tasks are skipped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import torch
from model import embed, features, load_model, save
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from data import TASKS, load_task

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from precision import fast_products
from table.drawings import prototype_head, seeded, write

RATE, STEPS, WARMUP, BATCH = 5e-4, 300, 30, 64


def head_of(work: Path, task: str, base: nn.Module) -> dict[str, Tensor]:
    """Return the task's frozen head, making and writing it first if it is missing."""
    path = work / "heads" / f"{task}.safetensors"
    if not path.exists():
        tensors = load_task(work, task)
        write(
            prototype_head(features(base, tensors["train_images"]), tensors["train_labels"]), path
        )
    return load_file(path)


def accuracy(model: nn.Module, head: dict[str, Tensor], images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose largest logit is their label's."""
    scores = F.linear(features(model, images), head["weight"], head["bias"])
    return (scores.argmax(1) == labels).float().mean().item()


def fine_tune(
    model: nn.Module,
    head: dict[str, Tensor],
    task: str,
    data: dict[str, Tensor],
    steps: int = STEPS,
) -> None:
    """Train every parameter of the body, with warm-up and cosine."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - WARMUP)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], [WARMUP])
    generator = seeded("fine-tune", task)
    for _ in range(steps):
        chosen = torch.randint(len(data["train_labels"]), (BATCH,), generator=generator)
        with fast_products():
            pooled = embed(model, data["train_images"][chosen].float() / 255)
        scores = F.linear(pooled, head["weight"], head["bias"])
        optimizer.zero_grad()
        F.cross_entropy(scores, data["train_labels"][chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def make_expert(work: Path, task: str, steps: int = STEPS) -> None:
    """Fine-tune and write one expert, unless it is there."""
    folder = work / "experts" / task
    if folder.exists():
        return
    start = time.monotonic()
    model, data = load_model(work / "base"), load_task(work, task)
    head = head_of(work, task, model)
    test = data["test_images"], data["test_labels"]
    before = accuracy(model, head, *test)
    fine_tune(model, head, task, data, steps)
    record = {"task": task, "base": before, "expert": accuracy(model, head, *test)}
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    save(model, part)
    (part / "accuracy.json").write_text(json.dumps(record, indent=1) + "\n")
    part.rename(folder)
    print(f"{task:12s} base {record['base']:.3f} expert {record['expert']:.3f} "
          f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--task", action="append", choices=TASKS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.task or TASKS:
        make_expert(arguments.work, name, arguments.steps)
