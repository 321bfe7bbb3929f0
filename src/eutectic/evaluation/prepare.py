"""A split, encoded once: batches of rows of like length, kept in memory for many models."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.errors import CheckpointError, Fault, RequestError, TaskError, suggest
from eutectic.evaluation.pictures import Pictures
from eutectic.evaluation.rows import data_hash, split_rows
from eutectic.evaluation.schema import Split, Task
from eutectic.evaluation.sources import processor_hash
from eutectic.models.batch import IGNORED_LABEL
from eutectic.models.processors import (
    image_mode,
    load_processor,
    longest_input,
    padding_id,
    positions_of,
)
from eutectic.models.transformers_loading import first_line, load_config
from eutectic.statistics.encode import named_by_numbers
from eutectic.statistics.rows import Row

BATCH_SIZE = 64


@dataclass(frozen=True, eq=False)
class Prepared:
    """The rows of one split as model inputs.

    Attributes:
        task: the task.
        split: the split.
        batches: model inputs, rows of like length together, without labels (language models and
            sequence to sequence: with `labels`, −100 where padded).
        order: `[n]`, the row that each row of the concatenated batches is.
        references: what is true, row by row: class indices, numbers, or normalised target texts.
        data_hash: identity of the rows and their answers.
        processor: the tokenizer or image processor.
        generate_tokens: how many tokens to generate at most; one more than the longest target,
            uncut, or what the model has positions for.
    """

    task: Task
    split: Split
    batches: Sequence[dict[str, Tensor]]
    order: Tensor
    references: tuple[int, ...] | tuple[float, ...] | tuple[str, ...]
    data_hash: str
    processor: Any = field(repr=False)
    generate_tokens: int = 0

    def __len__(self) -> int:
        return len(self.order)


def prepare(
    task: Task,
    split: Split,
    folder: str | Path,
    *,
    batch_size: int = BATCH_SIZE,
    limit: int | None = None,
    label_ids: Mapping[str, int] | None = None,
    answers: bool = True,
    base: Path | None = None,
) -> Prepared:
    """Read and encode a split for models with the tokenizer (or image processor) of `folder`.

    Texts are cut to `task.max_length` tokens, sorted by their number of tokens and padded on the
    right to the longest of their batch. Time: one tokenization. Memory: the token ids; of pictures
    the first 256 MB of pixels in float32, further batches are read again whenever they are run.

    Args:
        task: not of the kinds `function` and `lm-eval`.
        split: `proxy`, `validation` or `test`.
        folder: a checkpoint's folder: configuration, and tokenizer or image processor.
        batch_size: rows per batch; changes results by rounding only.
        limit: take the first rows only.
        label_ids: class name -> index, where the task names none; None: of the configuration.
        answers: labels are read; without them, there is nothing to score.
        base: whose configuration counts where `folder` is an adapter with a tokenizer only.

    Raises:
        RequestError: no such split, no rows, a missing column.
        TaskError: labels that neither the task nor the configuration knows.
        CheckpointError: no usable tokenizer in `folder`.
        MissingExtraError: transformers is not installed.
    """
    if task.kind in ("function", "lm-eval"):
        raise RequestError(f"task '{task.name}' ({task.kind}) reads its rows itself.")
    rows = split_rows(task, split, limit)
    processor, config = _open(Path(folder), task, base)
    if task.kind == "sequence-to-sequence":
        _check_targets(task, split, rows)
    references = references_of(task, rows, label_ids or config.label2id or {}) if answers else ()
    digest = data_hash(task, rows)
    generate = 0
    if task.kind == "image-classification":
        batches = Pictures(task, rows, processor, batch_size, image_mode(config))
        order = list(range(len(rows)))
    else:
        limit_tokens = task.max_length or longest_input(processor, config)
        encode = _Texts(task, rows, processor, limit_tokens)
        batches, order = encode.batches(batch_size)
        generate = min(encode.longest_target + 1, positions_of(config) or sys.maxsize)
    return Prepared(
        task, split, batches, torch.tensor(order), references, digest, processor, generate
    )


def references_of(
    task: Task, rows: Sequence[Row], label_ids: Mapping[str, int]
) -> tuple[int, ...] | tuple[float, ...] | tuple[str, ...]:
    """Return the answers: class indices, numbers, texts; none (`()`) for language models.

    Raises:
        TaskError: a label is no known class, or not a number; lists up to ten.
    """
    if task.kind in ("language-model", "function"):
        return ()
    if task.kind == "sequence-to-sequence":
        return tuple(normal_text(str(row[task.columns.target])) for row in rows)
    values: list[Any] = [row.get(task.columns.label) for row in rows]
    if all(value is None for value in values):
        return ()  # a proxy split needs no labels
    if task.labels is not None:
        label_ids = {name: i for i, name in enumerate(task.labels)}
    known = {str(name): int(i) for name, i in label_ids.items()}
    # Without names in the task, only the model's outputs tell how many classes there are.
    top = math.inf if task.labels is None else len(task.labels)
    found: list[Any] = []
    faults: list[Fault] = []
    for number, value in enumerate(values, 1):
        try:
            found.append(_finite(value) if task.kind == "regression" else _class(value, known, top))
        except (TypeError, ValueError):
            if task.kind == "regression":
                what = f"the label {value!r} is no finite number."
                faults.append(Fault("label", what, f"row {number}"))
                continue
            what = f"the label {value!r} is none of {', '.join(list(known)[:20])}."
            nearest = suggest(str(value), list(known))
            faults.append(Fault("label", what, f"row {number}", next=nearest))
    if faults:
        raise TaskError(faults[:10], f"task '{task.name}'")
    return tuple(found)


def _check_targets(task: Task, split: Split, rows: Sequence[Row]) -> None:
    """Refuse rows without a target: proxy data of other kinds need no answers."""
    for number, row in enumerate(rows, 1):
        if row.get(task.columns.target) is None:
            raise RequestError(
                f"task '{task.name}', split '{split}': row {number} has no "
                f"'{task.columns.target}'.\nOutputs of such models are compared and scored along "
                "their targets; name the column (columns: {target: NAME}) or add it."
            )


def open_tokenizer(folder: Path, task: Task, base: Path | None = None) -> Any:
    """Return the tokenizer of a language model's folder, or of an adapter's to a base.

    Raises:
        CheckpointError: no usable tokenizer in `folder`.
        MissingExtraError: transformers is not installed.
    """
    return _open(folder, task, base)[0]


def normal_text(text: str) -> str:
    """Return a text with runs of white space made one blank: what exact match compares."""
    return " ".join(text.split())


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _class(value: Any, known: Mapping[str, int], top: float) -> int:
    if isinstance(value, bool):
        value = _truth(value, known)
    if isinstance(value, float) and value.is_integer() and str(value) not in known:
        value = int(value)
    text = str(value)
    if text in known:
        return known[text]
    if isinstance(value, float):
        raise ValueError(text)
    if named_by_numbers(known) or not 0 <= int(value) < top:
        raise ValueError(text)
    return int(value)


def _truth(value: bool, known: Mapping[str, int]) -> str | int:
    """Return the name of a truth value, or 0 and 1 where no names of classes say otherwise."""
    for name in (str(value), str(value).lower()):
        if name in known:
            return name
    if any(name not in (f"LABEL_{i}", str(i)) for name, i in known.items()):
        raise ValueError(str(value))
    return int(value)


def _open(folder: Path, task: Task, base: Path | None) -> tuple[Any, Any]:
    """Return the processor and the configuration of a folder, or of an adapter's to a base."""
    images = task.kind == "image-classification"
    try:
        config = load_config(folder if base is None or (folder / "config.json").exists() else base)
        found = load_processor(folder, folder, images=images)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{folder}: no configuration and tokenizer for task '{task.name}': {first_line(error)}"
        ) from None
    # Without its files transformers makes a tokenizer of special tokens that knows no word.
    empty = not images and len(found) < len({*found.all_special_tokens}) + 2
    if empty or not processor_hash(folder):
        raise CheckpointError(
            f"{folder}: no tokenizer or image processor for task '{task.name}'.\n"
            "Copy its files there from the model that this one was made from."
        )
    return found, config


class _Texts:
    """Token ids of all rows, before they are sorted and padded."""

    def __init__(self, task: Task, rows: Sequence[Row], tokenizer: Any, max_length: int) -> None:
        self.task = task
        self.tokenizer = tokenizer
        options: dict[str, Any] = {"truncation": True, "max_length": max_length}
        columns = task.columns
        first = columns.source if task.kind == "sequence-to-sequence" else columns.text
        texts = [str(row[first]) for row in rows]
        pairs = None
        paired = ("pair-classification", "text-classification", "regression")
        if task.kind in paired and rows[0].get(columns.text_pair) is not None:
            pairs = [str(row[columns.text_pair]) for row in rows]
        self.inputs: dict[str, list[list[int]]] = dict(tokenizer(texts, pairs, **options))
        self.targets: list[list[int]] | None = None
        self.longest_target = 0
        if task.kind == "sequence-to-sequence":
            answers = [str(row[columns.target]) for row in rows]
            self.targets = tokenizer(text_target=answers, **options)["input_ids"]
            # What is scored is generated in full, however inputs are cut.
            uncut = tokenizer(text_target=answers, truncation=False, verbose=False)["input_ids"]
            self.longest_target = max(map(len, uncut))

    def batches(self, batch_size: int) -> tuple[tuple[dict[str, Tensor], ...], list[int]]:
        ids = self.inputs["input_ids"]
        # The longest first: if memory is short, that shows at once.
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        return tuple(self._batch(chunk) for chunk in chunks), order

    def _batch(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        fill = {
            "input_ids": padding_id(self.tokenizer),
            "token_type_ids": getattr(self.tokenizer, "pad_token_type_id", 0),
        }
        batch = {
            name: padded([values[i] for i in chosen], fill.get(name, 0))
            for name, values in self.inputs.items()
        }
        if self.targets is not None:
            batch["labels"] = padded([self.targets[i] for i in chosen], IGNORED_LABEL)
        elif self.task.kind == "language-model":
            batch["labels"] = batch["input_ids"].masked_fill(
                batch["attention_mask"] == 0, IGNORED_LABEL
            )
        return batch


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Return `[n, longest]` int64, filled on the right; one column at least, models need one."""
    width = max(1, *map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.int64)
