"""Writing checkpoints, good and hostile ones, for the tests of this room."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """Write a safetensors file with an arbitrary header (an object, or raw bytes)."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def item(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    """Return the header's entry of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def save_sharded(folder: Path, shards: Mapping[str, Mapping[str, Tensor]], **changes: str) -> Path:
    """Save shards with an index; `changes` adds to or overrides the weight map."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for file, held in shards.items():
        save_file(dict(held), folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
    write_index(folder, {**weight_map, **changes})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    """Write model.safetensors.index.json."""
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors hold the same bytes, whatever their shapes."""
    if a.dtype != b.dtype or a.numel() != b.numel():
        return False
    a, b = a.reshape(-1).contiguous(), b.reshape(-1).contiguous()
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
