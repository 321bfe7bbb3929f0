"""The unlabelled inputs of every task, as batches."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eutectic.calibration.settings import Settings
from eutectic.data.encoded_rows import EncodedRows, open_batches
from eutectic.errors import RequestError
from eutectic.models.batches import (
    LABEL_KEYS,
    Batch,
    examples,
    sample_count,
    tensors_by_name,
)
from eutectic.models.loading import LoadedModel
from eutectic.models.sites import is_encoder_decoder

Data = str | Path | Iterable[Batch]  # a file or folder of rows, or batches


@dataclass(frozen=True)
class Proxies:
    """The batches that a task's layers are fitted to, and those that only show how well."""

    fitted: list[Batch]
    held_out: list[Batch]

    @property
    def counts(self) -> tuple[int, int]:
        """How many examples there are of both."""
        return sum(map(sample_count, self.fitted)), sum(map(sample_count, self.held_out))


def draw(task: str, source: Data, loaded: LoadedModel, settings: Settings) -> Proxies:
    """Return a sample of a task's inputs, divided as `holdout` says.

    Rows of a file are drawn by `seed`; of batches, the first examples are taken.
    """
    found = source
    if isinstance(source, str | Path):
        found = open_batches(str(source), loaded, settings.reading)
    assert not isinstance(found, str | Path)
    if isinstance(found, EncodedRows):
        order = torch.randperm(
            len(found.rows), generator=torch.Generator().manual_seed(settings.seed)
        )
        fitted, held_out = _split(order[: settings.samples].tolist(), settings.holdout, task)
        parts = [
            list(replace(found, rows=[found.rows[i] for i in chosen])) if chosen else []
            for chosen in (fitted, held_out)
        ]
    else:
        batches = list(_first(found, settings.samples))
        count = sum(map(sample_count, batches))
        fitted, _ = _split(range(count), settings.holdout, task)
        parts = [list(_first(batches, len(fitted))), list(_rest(batches, len(fitted)))]
    return Proxies(*([_unlabelled(batch, loaded) for batch in part] for part in parts))


def _split(chosen: Any, holdout: float, task: str) -> tuple[list[int], list[int]]:
    count = len(chosen)
    apart = max(1, round(count * holdout)) if holdout else 0
    if count <= apart:
        held = f" beside the {apart} held out" if apart else ""
        raise RequestError(
            f"the data of the task '{task}' have {count or 'no'} example{'s' * (count != 1)}.\n"
            f"Calibration needs at least one{held}; some tens are better."
        )
    return list(chosen[: count - apart]), list(chosen[count - apart :])


def _first(batches: Iterable[Batch], count: int | None) -> Iterable[Batch]:
    for batch in batches:
        size = sample_count(batch)
        if count is not None and size >= count:
            yield examples(batch, 0, count)
            return
        if size:
            yield batch
        count = None if count is None else count - size


def _rest(batches: Iterable[Batch], start: int) -> Iterable[Batch]:
    for batch in batches:
        size = sample_count(batch)
        if start < size:
            yield examples(batch, start, size)
        start = max(0, start - size)


def _unlabelled(batch: Batch, loaded: LoadedModel) -> Batch:
    """Return the batch without labels, which only a decoder beside an encoder reads as inputs."""
    if is_encoder_decoder(loaded.model):
        return batch
    return {k: v for k, v in tensors_by_name(batch).items() if k not in LABEL_KEYS}
