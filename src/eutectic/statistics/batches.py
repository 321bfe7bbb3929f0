"""An identity for every example of a batch."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from eutectic.models.batch import IGNORED_LABEL, LABEL_KEYS, Batch, sample_count, tensors_by_name
from eutectic.models.masks import decoder_mask


def example_hashes(batch: Batch, paired: bool) -> tuple[list[int], list[int]]:
    """Return two 63-bit hashes per example: of its inputs, and of inputs and labels.

    Padding does not enter: what the masks exclude is dropped first, so that an example has one
    hash in any batch.
    """
    items = {
        k: v for k, v in tensors_by_name(batch).items() if isinstance(v, Tensor) and v.ndim > 0
    }
    count = sample_count(batch)
    items = {k: v.detach().cpu() for k, v in items.items() if v.shape[0] == count}
    first = items.get("attention_mask")
    second = decoder_mask(items) if paired else None
    inputs: list[int] = []
    everything: list[int] = []
    for index in range(count):
        digest = hashlib.sha256()
        for key in sorted(items.keys() - set(LABEL_KEYS)):
            if key.endswith("attention_mask"):
                continue
            _update(digest, key, items[key], index, second if key.startswith("decoder") else first)
        inputs.append(_number(digest))
        for key in sorted(items.keys() & set(LABEL_KEYS)):
            _update(digest, key, items[key], index, None if paired else first)
        everything.append(_number(digest))
    return inputs, everything


def _update(digest: Any, key: str, values: Tensor, index: int, mask: Tensor | None) -> None:
    row = values[index]
    if mask is not None and mask.ndim == 2 and values.shape[:2] == mask.shape:
        row = row[mask[index].bool()]
    elif key in LABEL_KEYS and row.ndim == 1:
        row = row[row != IGNORED_LABEL]
    row = row.contiguous()
    digest.update(f"{key}\0{row.dtype}\0{[*row.shape]}\0".encode())
    digest.update(row.reshape(-1).view(torch.uint8).numpy())


def _number(digest: Any) -> int:
    return int.from_bytes(digest.digest()[:8], "big") >> 1
