"""Texts of rows as token ids, and batches of them padded on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eutectic.data.columns import INPUTS, Row, RowsOfTask
from eutectic.models.batches import IGNORED_LABEL
from eutectic.models.loading import padding_id


@dataclass(frozen=True)
class TokenIds:
    """Token ids of rows, not yet padded.

    Attributes:
        inputs: name -> one list per row, as the tokenizer returns them.
        padding: name -> what fills shorter rows; 0 where a name is absent.
        targets: of sequence to sequence: one list per row.
        predicts_inputs: labels are the inputs themselves, as for language models.
    """

    inputs: Mapping[str, Sequence[Sequence[int]]]
    padding: Mapping[str, int]
    targets: Sequence[Sequence[int]] | None = None
    predicts_inputs: bool = False

    def batch(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Return the chosen rows, padded to the longest; labels are -100 where padded."""
        batch = {
            name: padded([values[i] for i in chosen], self.padding.get(name, 0))
            for name, values in self.inputs.items()
        }
        if self.targets is not None:
            batch["labels"] = padded([self.targets[i] for i in chosen], IGNORED_LABEL)
        elif self.predicts_inputs:
            padding = batch["attention_mask"] == 0
            batch["labels"] = batch["input_ids"].masked_fill(padding, IGNORED_LABEL)
        return batch


def token_ids(task: RowsOfTask, rows: Sequence[Row], tokenizer: Any, max_length: int) -> TokenIds:
    """Return the token ids of rows whose columns were checked, cut to `max_length`."""
    columns = task.columns
    first, *second = INPUTS[task.kind]
    texts: dict[str, Any] = {"text": _texts(rows, getattr(columns, first))}
    if second and rows[0].get(columns.text_pair) is not None:
        texts["text_pair"] = _texts(rows, columns.text_pair)
    inputs = dict(tokenizer(**texts, truncation=True, max_length=max_length))
    targets = None
    if task.kind == "sequence-to-sequence":
        answers = _texts(rows, columns.target)
        targets = tokenizer(text_target=answers, truncation=True, max_length=max_length)
        targets = targets["input_ids"]
    padding = {
        "input_ids": padding_id(tokenizer),
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
    }
    return TokenIds(inputs, padding, targets, task.kind == "language-model")


def longest_target(task: RowsOfTask, rows: Sequence[Row], tokenizer: Any) -> int:
    """Return the tokens of the longest target, uncut; 0 for tasks without texts to generate."""
    if task.kind != "sequence-to-sequence":
        return 0
    answers = _texts(rows, task.columns.target)
    uncut = tokenizer(text_target=answers, truncation=False, verbose=False)["input_ids"]
    return max(map(len, uncut))


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Return `[n, longest]` int64, filled on the right; one column at least, models need one."""
    width = max(1, *map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.int64)


def _texts(rows: Sequence[Row], column: str) -> list[str]:
    return [str(row[column]) for row in rows]
