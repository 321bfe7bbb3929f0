"""Pre-train the base: tell the characters of thirteen scripts apart, in the fonts of train.

    python benchmarks/glyphs/pretrain.py --work DIR [--steps N]

Writes `DIR/base/`. One thread; killed runs continue from the last
checkpoint (every 250 steps).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from model import HIDDEN, embed, new_model, save
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from data import distort, seeded, write

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from precision import fast_products

STEPS, BATCH, RATE, WARMUP, EVERY = 8000, 64, 8e-4, 300, 250


def schedule(step: int, steps: int) -> float:
    """Return the share of the rate: warm-up, constant, linear to zero over the last 30 %."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (0.3 * steps))


def batches(tensors: dict[str, Tensor], first: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield distorted images and labels: each class as often as the root of its number of fonts."""
    labels = tensors["train_labels"]
    weights = torch.bincount(labels)[labels].double().rsqrt()
    for step in range(first, steps):
        generator = seeded("pretrain", step)
        chosen = torch.multinomial(weights, BATCH, generator=generator)
        yield distort(tensors["train_images"][chosen].float() / 255, generator), labels[chosen]


def accuracy(network: nn.ModuleDict, tensors: dict[str, Tensor], size: int = 1000) -> float:
    """Return the accuracy on distorted glyphs in fonts of validation."""
    generator = seeded("pretrain validation")
    chosen = torch.randperm(len(tensors["validation_labels"]), generator=generator)[:size]
    images = distort(tensors["validation_images"][chosen].float() / 255, generator)
    with torch.no_grad():
        logits = network["head"](torch.cat([embed(network["body"], p) for p in images.split(250)]))
    return (logits.argmax(1) == tensors["validation_labels"][chosen]).float().mean().item()


def _save(network: nn.Module, optimizer: torch.optim.Optimizer, step: int, path: Path) -> None:
    tensors = {f"model.{k}": v for k, v in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    write({**tensors, "done": torch.tensor(step)}, path)


def _resume(network: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> int:
    if not path.exists():
        return 0
    tensors = load_file(path)
    network.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for name, parameter in network.named_parameters():
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {k: tensors[f"{k}.{name}"] for k in keys}
    return int(tensors["done"])


def pretrain(work: Path, steps: int = STEPS) -> None:
    """Train and write `work/base/`, unless it is there."""
    if (work / "base" / "model.safetensors").exists():
        return
    tensors = load_file(work / "pretraining.safetensors")
    body = new_model()
    head = nn.Linear(HIDDEN, int(tensors["train_labels"].max()) + 1)
    network = nn.ModuleDict({"body": body, "head": head}).train()
    optimizer = torch.optim.AdamW(network.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.05)
    checkpoint = work / "pretraining.checkpoint.safetensors"
    first = _resume(network, optimizer, checkpoint)
    start = time.monotonic()
    for step, (images, labels) in enumerate(batches(tensors, first, steps), first):
        for part in optimizer.param_groups:
            part["lr"] = RATE * schedule(step, steps)
        with fast_products():
            pooled = embed(body, images)
        loss = F.cross_entropy(head(pooled), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % EVERY == 0:
            _save(network, optimizer, step + 1, checkpoint)
            rate = (step + 1 - first) * BATCH / (time.monotonic() - start)
            right = accuracy(network, tensors)
            print(f"step {step + 1}/{steps} loss {loss.item():.3f} "
                  f"validation {right:.3f} {rate:.0f} images/s", flush=True)  # fmt: skip
    save(body, work / "base.part")
    (work / "base.part").rename(work / "base")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pretrain(arguments.work, arguments.steps)
