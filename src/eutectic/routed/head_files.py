"""Heads of experts in folders: found in checkpoints, kept in a routed model's folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eutectic.checkpoint.experts import is_adapter, open_expert
from eutectic.checkpoint.folder import copy_side_files, feeding_files
from eutectic.checkpoint.locating import resolve
from eutectic.checkpoint.opening import open_reader
from eutectic.conventions import image_tower_names
from eutectic.errors import CheckpointError
from eutectic.models.loading import in_words, load_config
from eutectic.models.task_models import EXPERTS
from eutectic.routed.heads import StoredHead
from eutectic.storage import announce
from eutectic.storage.small_files import check_regular, read_bytes

HEADS = "heads"  # the folder of a routed model that holds one per expert
HEAD_FILE = "head.safetensors"


def find_heads(merged: Path, experts: Mapping[str, str | Path]) -> dict[str, StoredHead]:
    """Return expert -> its head, of those that have one.

    Where the merged model's folder keeps `experts/<name>/`, all in which that differs from the
    merged model; else the tensors of the expert's own folder that the merged model lacks or has in
    another shape. An adapter's head is known from the former alone.
    """
    found: dict[str, StoredHead] = {}
    for name, source in experts.items():
        kept = merged / EXPERTS / name
        folder = kept if kept.is_dir() else resolve(source)
        if kept.is_dir() or not is_adapter(folder):
            head = expert_head(folder, merged, same=kept.is_dir())
            if head is not None:
                found[name] = head
    return found


def expert_head(folder: Path, merged: Path, *, same: bool = False) -> StoredHead | None:
    """Return the head of a checkpoint beside a merged model, None where it has none.

    `same`: their bodies are one, so that a tensor of other values belongs to the head, too.
    """
    if not (folder / "config.json").is_file():
        return None
    tensors: dict[str, Tensor] = {}
    with open_reader(merged) as body, closing(open_expert(folder, body.index)) as lender:
        for name, entry in lender.extra.items():
            if name not in lender.tied:
                tensors[entry.name] = lender.read_extra(name).view(entry.shape)
        for name, entry in lender.entries.items():
            differs = entry.shape != body.entries[name].shape
            if differs or (same and not torch.equal(lender.read(name), body.read(name))):
                tensors[entry.name] = lender.read(name).view(entry.shape)
    with in_words(folder):
        config = load_config(folder)
    if not tensors or not getattr(config, "architectures", None):
        return None
    return StoredHead(config, tensors, folder if _feeds_otherwise(folder, merged) else None)


def whole_around(folder: Path, tower: Path) -> StoredHead:
    """Return the parts of a model with two towers that stand around a tower of pictures."""
    with open_reader(folder) as whole, open_reader(tower) as part:
        held = {*image_tower_names(part.entries, whole.entries).values()}
        tensors = {
            n: whole.read(n).view(e.shape) for n, e in whole.entries.items() if n not in held
        }
    with in_words(folder):
        config = load_config(folder)
    return StoredHead(config, tensors)


def _feeds_otherwise(folder: Path, merged: Path) -> bool:
    """Tell whether a tokenizer or processor differs from the merged model's."""
    own, theirs = feeding_files(folder), feeding_files(merged)
    return bool(own) and (
        own != theirs or any((folder / n).read_bytes() != (merged / n).read_bytes() for n in own)
    )


def write_heads(path: Path, heads: Mapping[str, StoredHead]) -> None:
    """Write `heads/<name>/` into the folder of a routed model."""
    for name, head in heads.items():
        folder = path / HEADS / name
        folder.mkdir(parents=True)
        for written in ("config.json", HEAD_FILE):
            announce(folder / written)
        head.config.save_pretrained(folder)
        tensors = {key: values.contiguous().clone() for key, values in head.tensors.items()}
        save_file(tensors, folder / HEAD_FILE, metadata={"format": "pt"})
        if head.feeding is not None:
            copy_side_files(head.feeding, folder, feeding_files(head.feeding))


def read_heads(path: Path, names: Iterable[str]) -> dict[str, StoredHead]:
    """Return the heads of these experts in the folder of a routed model."""
    found: dict[str, StoredHead] = {}
    for name in names:
        folder = path / HEADS / name
        file = folder / HEAD_FILE
        try:
            check_regular(file)
            read_bytes(folder / "config.json")
            tensors: dict[str, Any] = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: the head cannot be read: {error}.") from None
        with in_words(folder):
            config = load_config(folder)
        if not getattr(config, "architectures", None):
            raise CheckpointError(f"{folder / 'config.json'}: names no class (`architectures`).")
        found[name] = StoredHead(config, tensors, folder if feeding_files(folder) else None)
    return found
