"""Batches of examples: mappings, sequences or tensors with the examples on the first axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eutectic.errors import RequestError

Batch = Mapping[str, Any] | Sequence[Any] | Tensor

IGNORED_LABEL = -100
LABEL_KEYS = ("labels", "label", "label_ids")


def sample_count(batch: Batch) -> int:
    """Return the number of examples of a batch: the first axis of its first tensor.

    Raises:
        RequestError: the batch holds no tensor.
    """
    for value in tensors_by_name(batch).values():
        if isinstance(value, Tensor) and value.ndim > 0:
            return value.shape[0]
    raise RequestError(
        f"a batch must be a mapping, sequence or tensor with examples on the first axis; "
        f"got {type(batch).__name__} without any tensor."
    )


def call(model: torch.nn.Module, batch: Batch) -> Any:
    """Run the model on a batch: mappings as keywords, sequences as positions."""
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def transform(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """Return the batch with `function` applied to every tensor in it."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {k: function(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return [function(v) if isinstance(v, Tensor) else v for v in batch]


def examples(batch: Batch, start: int, stop: int) -> Batch:
    """Return a batch of the examples [start, stop)."""
    count = sample_count(batch)
    return transform(batch, lambda t: t[start:stop] if t.ndim > 0 and t.shape[0] == count else t)


def tensors_by_name(batch: Batch) -> dict[str, Any]:
    """Return what a batch holds by name; sequences by position."""
    if isinstance(batch, Tensor):
        return {"0": batch}
    if isinstance(batch, Mapping):
        return dict(batch)
    return {str(i): value for i, value in enumerate(batch)}
