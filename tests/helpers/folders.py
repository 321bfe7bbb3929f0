"""Small checkpoints on disk, and what a folder holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def make_base(seed: int = 0, *, layers: int = 2, width: int = 16, vocabulary: int = 32) -> Tensors:
    """Return a state dict with a table, matrices, biases, norms, a scalar and an integer buffer."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors: Tensors = {"embed_tokens.weight": randn(vocabulary, width)}
    for i in range(layers):
        tensors[f"layers.{i}.proj.weight"] = randn(2 * width, width)
        tensors[f"layers.{i}.proj.bias"] = randn(2 * width)
        tensors[f"layers.{i}.norm.weight"] = randn(width)
    tensors["logit_scale"] = randn(1)[0]
    tensors["position_ids"] = torch.arange(width)
    return tensors


def make_expert(base: Mapping[str, Tensor], seed: int, size: float = 0.1) -> Tensors:
    """Return `base` with noise on every floating tensor, each in its own dtype."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (w.double() + size * torch.randn(w.shape, generator=generator).double()).to(w.dtype)
        if w.is_floating_point()
        else w.clone()
        for name, w in base.items()
    }


def save(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> Path:
    """Save one safetensors file and a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(config or {"model_type": "toy"})))
    return folder


def save_sharded(folder: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Save safetensors shards with an index and a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, held in shards.items():
        save_file(dict(held), folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    return folder


def load(folder: Path) -> Tensors:
    """Return all tensors of the safetensors files in a folder, not in its subfolders."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    return tensors


def digests(folder: Path) -> dict[str, str]:
    """Return relative path -> SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def looks_finished(output: Path) -> bool:
    """Tell whether somebody could take `output` for a model."""
    return output.exists() and any(output.iterdir())
