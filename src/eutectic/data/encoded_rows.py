"""Rows as batches for a model, by the checkpoint's own tokenizer or image processor."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from eutectic.data.columns import (
    ClassLabels,
    Columns,
    Row,
    RowsOfTask,
    answer_of,
    check_answers,
    check_columns,
    check_forms,
    check_pairs,
    check_text,
    inputs_of,
    is_spoken,
    required_inputs,
)
from eutectic.data.conversations import answered_ids
from eutectic.data.images import image_inputs, locate_images
from eutectic.data.row_files import read_rows
from eutectic.errors import RequestError
from eutectic.models.batches import IGNORED_LABEL, Batch
from eutectic.models.loading import LoadedModel
from eutectic.models.model_inputs import image_mode, longest_input, padding_id, takes_images
from eutectic.models.task_kinds import GENERATIVE, PICTURES, TaskKind


@dataclass(frozen=True)
class TokenIds:
    """Token ids of rows, one list each, not yet padded; `padding` is what fills shorter ones (0).

    Targets are those of sequence to sequence; language models predict their inputs, of prompts with
    completions and of chats the `answers` alone.
    """

    inputs: Mapping[str, Sequence[Sequence[int]]]
    padding: Mapping[str, int]
    targets: Sequence[Sequence[int]] | None = None
    predicts_inputs: bool = False
    answers: Sequence[Sequence[bool]] | None = None

    @property
    def predicted(self) -> list[int]:
        """How many tokens of each row a language model predicts: those after the first."""
        lengths = [max(len(ids) - 1, 0) for ids in self.inputs["input_ids"]]
        return lengths if self.answers is None else [sum(marks[1:]) for marks in self.answers]

    def batch(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Return the chosen rows, padded to the longest; labels are -100 where padded."""
        batch = {
            name: padded([values[i] for i in chosen], self.padding.get(name, 0))
            for name, values in self.inputs.items()
        }
        if self.targets is not None:
            batch["labels"] = padded([self.targets[i] for i in chosen], IGNORED_LABEL)
        elif self.predicts_inputs:
            ignored = batch["attention_mask"] == 0
            if self.answers is not None:
                ignored |= padded([self.answers[i] for i in chosen], 0) == 0
            batch["labels"] = batch["input_ids"].masked_fill(ignored, IGNORED_LABEL)
        return batch


def token_ids(
    task: RowsOfTask, rows: Sequence[Row], tokenizer: Any, max_length: int, number: int = 1
) -> TokenIds:
    """Return the token ids of rows whose columns were checked, cut to `max_length`.

    The first row's `number` is for messages.
    """
    columns = task.columns
    first, *second = inputs_of(task, rows[0])
    if task.kind == "language-model" and first != "text":
        found = answered_ids(task, rows, tokenizer, max_length, number)
        read = {"input_ids": found.ids, "attention_mask": [[1] * len(ids) for ids in found.ids]}
        if "token_type_ids" in tokenizer.model_input_names:
            read["token_type_ids"] = [[0] * len(ids) for ids in found.ids]
        return TokenIds(read, {"input_ids": padding_id(tokenizer)}, None, True, found.answers)
    texts: dict[str, Any] = {"text": _texts(rows, getattr(columns, first))}
    if second and rows[0].get(columns.text_pair) is not None:
        texts["text_pair"] = _texts(rows, columns.text_pair)
    inputs = dict(tokenizer(**texts, truncation=True, max_length=max_length))
    targets = None
    if task.kind == "sequence-to-sequence":
        answers = _texts(rows, _target(task, rows[0]))
        encoded = tokenizer(text_target=answers, truncation=True, max_length=max_length)
        targets = encoded["input_ids"]
    padding = {
        "input_ids": padding_id(tokenizer),
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
    }
    return TokenIds(inputs, padding, targets, task.kind == "language-model")


def longest_target(task: RowsOfTask, rows: Sequence[Row], tokenizer: Any) -> int:
    """Return the tokens of the longest target, uncut; 0 for tasks without texts to generate."""
    if task.kind != "sequence-to-sequence":
        return 0
    answers = _texts(rows, _target(task, rows[0]))
    uncut = tokenizer(text_target=answers, truncation=False, verbose=False)["input_ids"]
    return max(map(len, uncut))


def _target(task: RowsOfTask, row: Row) -> str:
    """Return the column of the texts that a model of sequence to sequence is to generate."""
    return str(getattr(task.columns, answer_of(task, row) or "target"))


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Return `[n, longest]` int64, filled on the right; one column at least, models need one."""
    width = max(1, *map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.int64)


def _texts(rows: Sequence[Row], column: str) -> list[str]:
    for number, row in enumerate(rows, 1):
        check_text(row[column], column, f"row {number}")
    return [str(row[column]) for row in rows]


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How the rows of a file become batches."""

    columns: Columns = Columns()
    batch_size: int = 16
    max_length: int | None = None  # tokens per text; None: what the model takes, at most 512
    max_examples: int | None = None
    split: str | None = None  # of a `datasets` folder that has several
    trust_code: bool = False  # `module:function` may be data
    chat_template: str | None = None  # a known one, Jinja or a model's folder; None: the own


@dataclass(frozen=True)
class EncodedRows:
    """Batches of model inputs, encoded when they are read; the same on every reading.

    Texts are padded on the right to the longest of a batch, and cut to `max_length` tokens. Without
    `labels` none are read, and any or none will do; without `image_mode` the model takes texts.
    """

    rows: Sequence[Row]
    kind: TaskKind
    processor: Any
    columns: Columns
    batch_size: int
    max_length: int
    labels: ClassLabels | None = None
    image_mode: str | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        """Refuse data of which some rows are pairs, or of another form."""
        if self.image_mode is None:
            check_pairs(self.rows, self)
            check_forms(self.rows, self)
        if self.chat_template is not None and not any(is_spoken(self, r) for r in self.rows[:1]):
            raise RequestError(
                "a chat template is named, and the rows hold no messages.\n"
                "Leave it out, or name their column with --messages-column."
            )

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        numbers = range(len(self.rows))
        for start in numbers[:: self.batch_size]:
            chosen = numbers[start : start + self.batch_size]
            yield self._encode([self.rows[i] for i in chosen], start + 1)

    def _encode(self, rows: Sequence[Row], first: int) -> dict[str, Tensor]:
        """Return one batch; `first` is the number of its first row, for messages."""
        wanted = ["image"] if self.image_mode is not None else required_inputs(self, rows[0])
        if self.kind == "sequence-to-sequence":
            wanted.append(answer_of(self, rows[0]) or "target")
        labelled = self.kind not in GENERATIVE and self.columns.label in rows[0]
        labels = self.labels if labelled else None
        if labels is not None:
            wanted.append("label")
        advice = _advice
        if self.columns.image in rows[0] and self.columns.text not in rows[0]:
            advice = _of_pictures
        check_columns(rows, self.columns, wanted, advice=advice, first=first)
        if self.image_mode is not None:
            images = [row[self.columns.image] for row in rows]
            where = f"rows {first} to {first + len(rows) - 1}"
            batch = image_inputs(images, self.processor, self.image_mode, where)
        else:
            encoded = token_ids(self, rows, self.processor, self.max_length, first)
            batch = encoded.batch(range(len(rows)))
        if labels is not None:
            numbered = enumerate((row[self.columns.label] for row in rows), first)
            batch["labels"] = torch.tensor([labels.of_row(value, n) for n, value in numbered])
        return batch


def open_batches(
    source: str,
    loaded: LoadedModel,
    options: BatchOptions,
    *,
    needs_labels: bool = False,
    classes: int | None = None,
) -> Iterable[Batch]:
    """Return batches of a data set for a loaded model; see `row_files.read_rows` for sources.

    Labels are read only if `needs_labels`: without gradients, or with drawn labels, any or none
    will do. `classes` says how many there are where a head of its own decides that.
    """
    rows = read_rows(source, split=options.split, trust_code=options.trust_code)
    if len(rows) and isinstance(first := rows[0], Mapping):
        if any(isinstance(value, Tensor) for value in first.values()):
            return rows  # batches already
    if options.max_examples is not None and len(rows) > options.max_examples:
        rows = list(islice(rows, options.max_examples))
    if needs_labels:
        check_answers(rows, loaded.task, options.columns, source)
    config: Any = loaded.model.config
    images = takes_images(loaded.model) or loaded.task in PICTURES
    if images:
        rows = locate_images(rows, options.columns.image, source)
    sets = ("regression", "multi_label_classification")  # labels are numbers, or sets of classes
    if classes is None and getattr(config, "problem_type", None) not in sets:
        classes = getattr(config, "num_labels", None)
    labels = ClassLabels(loaded.label_ids, classes if (classes or 0) > 1 else None)
    return EncodedRows(
        rows,
        loaded.task,
        loaded.processor,
        options.columns,
        options.batch_size,
        options.max_length or longest_input(loaded.processor, config),
        labels if needs_labels else None,
        image_mode(config) if images else None,
        options.chat_template,
    )


def _of_pictures(_: str) -> str:
    return (
        "These are rows of pictures. Say what the model does with them: --task "
        f"{' or '.join(PICTURES)}."
    )


def _advice(field: str) -> str:
    return f"Name the right one with --{field.replace('_', '-')}-column."
