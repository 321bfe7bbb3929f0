"""What the suites of pictures share: seeds, files written whole, and heads of prototypes."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

SHOTS, SHARPNESS = 16, 20.0


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part)
    part.replace(path)


def seeded(*names: object) -> torch.Generator:
    """Return a generator seeded by names, the same on every machine."""
    return torch.Generator().manual_seed(zlib.crc32(" ".join(map(str, names)).encode()))


def prototype_head(inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return weight `[classes, hidden]` and bias: the cosine to each class's mean, scaled.

    The scale is `SHARPNESS`. Means are over the first `SHOTS` examples of a class, and relative to
    the mean of all examples; the length of a feature is taken to be the average one, which keeps
    the head linear.
    """
    centre = inputs.mean(0)
    first = [(labels == c).nonzero()[:SHOTS, 0] for c in range(int(labels.max()) + 1)]
    directions = F.normalize(torch.stack([inputs[rows].mean(0) - centre for rows in first]), dim=1)
    weight = SHARPNESS * directions / (inputs - centre).norm(dim=1).mean()
    return {"weight": weight, "bias": -weight @ centre}


def load_head(file: Path) -> nn.Linear:
    """Read a frozen head."""
    tensors = load_file(file)
    head = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0])
    head.load_state_dict(tensors)
    return head.requires_grad_(False)
