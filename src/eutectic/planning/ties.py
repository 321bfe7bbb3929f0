"""Tied tensors that a checkpoint stores twice."""

from __future__ import annotations

from collections.abc import Callable

import torch

from eutectic.checkpoint.experts import Expert
from eutectic.conventions import is_output_vocabulary, may_be_vocabulary
from eutectic.planning.inputs import BaseReader

Read = Callable[[str, int, int], torch.Tensor]

_WINDOW = 1024


def tied_to(base: BaseReader) -> dict[str, str]:
    """Return tensor -> earlier tensor for vocabulary tables that a file holds more than once.

    transformers drops such copies when it saves; other writers keep them. A copy is recognised by
    name, shape, dtype and three samples of its content, and is merged by the rule and the random
    numbers of its partner, so that both stay equal.
    """
    matrices = [e for e in base.entries.values() if len(e.shape) == 2]
    tables = [e for e in matrices if may_be_vocabulary(e.name)]
    outputs = [e for e in matrices if _is_output(e.name)]
    tied: dict[str, str] = {}
    for position, entry in enumerate([*tables, *outputs]):
        for partner in tables[:position]:
            alike = (partner.shape, partner.dtype) == (entry.shape, entry.dtype)
            if alike and partner.name not in tied and _same(base, entry.name, partner.name):
                tied[entry.name] = partner.name
                break
    return tied


def _is_output(name: str) -> bool:
    return is_output_vocabulary(name) and not may_be_vocabulary(name)


def is_copy(expert: Expert, extra: str) -> bool:
    """Tell whether a tensor that the base lacks repeats a vocabulary table of the same expert.

    Such as the output embeddings in `torch.save(model.state_dict())` of a tied model: no head.
    """
    entry = expert.extra[extra]
    if len(entry.shape) != 2 or not (is_output_vocabulary(extra) or may_be_vocabulary(extra)):
        return False
    alike = (
        name
        for name, own in expert.entries.items()
        if may_be_vocabulary(name) and (own.shape, own.dtype) == (entry.shape, entry.dtype)
    )
    return any(_equal(expert.read_extra, extra, expert.read, name, entry.numel) for name in alike)


def _same(base: BaseReader, first: str, second: str) -> bool:
    return _equal(base.read, first, base.read, second, base.entries[first].numel)


def _equal(left: Read, first: str, right: Read, second: str, length: int) -> bool:
    for start in {0, max(0, length // 2 - _WINDOW), max(0, length - _WINDOW)}:
        stop = min(length, start + _WINDOW)
        a, b = left(first, start, stop), right(second, start, stop)
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return False
    return True
