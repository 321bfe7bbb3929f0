"""Rows into batches, by the checkpoint's own tokenizer or image processor."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from eutectic.errors import RequestError, StatisticsError
from eutectic.models.batch import IGNORED_LABEL
from eutectic.models.task_kinds import GENERATIVE, TaskKind
from eutectic.statistics.rows import Row, half_paired


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column holds what; one that no task needs may be absent under its default name."""

    text: str = "text"
    text_pair: str = "text_pair"
    label: str = "label"
    source: str = "source"
    target: str = "target"
    image: str = "image"


def named_by_numbers(label_ids: Mapping[str, int]) -> bool:
    """Tell whether "1", "2", "3" are names of classes 0, 1, 2: numbers are then no places."""
    return any(name.isdecimal() and int(name) != index for name, index in label_ids.items())


@dataclass(frozen=True)
class EncodedRows:
    """Batches of model inputs, encoded when they are read; the same on every reading.

    Texts are padded on the right to the longest of a batch, and cut to `max_length` tokens.

    Attributes:
        rows: the data.
        processor: tokenizer or image processor, as transformers makes them.
        task: what the model is given.
        columns: names of the columns.
        batch_size: rows per batch.
        max_length: tokens per text.
        label_ids: class name -> index, from the model's configuration.
        image_mode: of the pictures that the model takes, as `image_mode` says; None: it takes
            texts.
        needs_labels: whether labels are read; without, no column of them is looked at.
        classes: number of classes that a label is one of; None does not check.
    """

    rows: Sequence[Row]
    processor: Any
    task: TaskKind
    columns: Columns
    batch_size: int
    max_length: int
    label_ids: dict[str, int]
    image_mode: str | None = None
    needs_labels: bool = True
    classes: int | None = None

    def __post_init__(self) -> None:
        """Refuse data of which some rows are pairs."""
        column = self.columns.text_pair
        if self.image_mode is not None or self.task in GENERATIVE:
            return
        if mixed := half_paired(self.rows, column):
            raise RequestError(
                f"row {mixed[1]} has no '{column}', row {mixed[0]} has.\n"
                "Rows are pairs or single texts; make them two files."
            )

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.rows), self.batch_size):
            stop = min(start + self.batch_size, len(self.rows))
            yield self.encode([self.rows[i] for i in range(start, stop)], start)

    def encode(self, rows: Sequence[Row], start: int) -> dict[str, Tensor]:
        """Return one batch; `start` is the number of its first row, for messages.

        Raises:
            RequestError: a column that the task needs is missing.
            StatisticsError: a label that the model does not know, or an unreadable image.
        """
        if self.image_mode is not None:
            column = self._column("image", rows, start)
            images = [open_image(v, self.image_mode) for v in column]
            batch = dict(self.processor(images=images, return_tensors="pt"))
            return batch | ({} if self.task in GENERATIVE else self._labels(rows, start))
        if self.task == "sequence-to-sequence":
            batch = self._texts(self._column("source", rows, start))
            target = self._texts(self._column("target", rows, start), target=True)
            return batch | {"labels": _masked(target["input_ids"], target["attention_mask"])}
        texts = self._column("text", rows, start)
        if self.task == "language-model":
            batch = self._texts(texts)
            return batch | {"labels": _masked(batch["input_ids"], batch["attention_mask"])}
        pairs = None
        if self.columns.text_pair in rows[0] or self.columns.text_pair != Columns.text_pair:
            pairs = self._column("text_pair", rows, start)
        batch = self._texts(texts, pairs)
        return batch | ({} if self.task in GENERATIVE else self._labels(rows, start))

    def _column(self, name: str, rows: Sequence[Row], start: int) -> list[Any]:
        column = getattr(self.columns, name)
        for number, row in enumerate(rows, start + 1):
            if column in row and row[column] is None:
                raise StatisticsError(f"row {number}: column '{column}' is empty.")
            if column not in row:
                raise RequestError(
                    f"row {number} has no column '{column}'; it has {', '.join(map(str, row))}.\n"
                    f"Name the right one with --{name.replace('_', '-')}-column."
                )
        return [row[column] for row in rows]

    def _texts(
        self, texts: list[Any], pairs: list[Any] | None = None, target: bool = False
    ) -> dict[str, Tensor]:
        options: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "pt"}
        options["max_length"] = self.max_length
        options["text_target" if target else "text"] = [str(text) for text in texts]
        if pairs is not None:
            options["text_pair"] = [str(pair) for pair in pairs]
        batch = dict(self.processor(**options))
        if batch["input_ids"].shape[1] == 0:
            # Texts without a single token: models take no empty sequence, but a masked one.
            batch = dict(self.processor(**{**options, "padding": "max_length", "max_length": 1}))
        return batch

    def _labels(self, rows: Sequence[Row], start: int) -> dict[str, Tensor]:
        if not self.needs_labels or self.columns.label not in rows[0]:
            return {}
        values = self._column("label", rows, start)
        return {
            "labels": torch.tensor([self._label(v, start + i) for i, v in enumerate(values, 1)])
        }

    def _label(self, value: Any, number: int) -> int | float | list[float]:
        if isinstance(value, list):
            return value
        if str(value) in self.label_ids:
            return self.label_ids[str(value)]
        try:
            if named_by_numbers(self.label_ids):
                raise ValueError
            label = float(value)
        except (TypeError, ValueError):
            known = ", ".join(list(self.label_ids)[:20])
            raise StatisticsError(
                f"row {number}: the model knows no label '{value}'.\nIts labels: {known}."
            ) from None
        if self.classes is not None:
            if not label.is_integer() or not 0 <= label < self.classes:
                raise StatisticsError(
                    f"row {number}: label {value} is none of the model's {self.classes} classes, "
                    f"0 to {self.classes - 1}."
                )
            return int(label)
        return int(label) if isinstance(value, int) or str(value).isdecimal() else label


def _masked(tokens: Tensor, mask: Tensor) -> Tensor:
    return tokens.masked_fill(mask == 0, IGNORED_LABEL)


def open_image(value: Any, mode: str = "RGB") -> Any:
    """Return an image in a mode of Pillow's, from a path, a file's bytes, or an image.

    A mapping with `bytes` or `path`, as `datasets` keeps pictures in parquet files, counts as what
    it holds. Other values are returned as they are.

    Raises:
        StatisticsError: the file is not a readable image.
    """
    value = _held(value)
    if not isinstance(value, str | Path | bytes):
        return _converted(value, mode) if hasattr(value, "convert") else value
    from PIL import Image, UnidentifiedImageError

    shown = f"{len(value)} bytes" if isinstance(value, bytes) else value
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
            return _converted(image, mode)
    except (OSError, UnidentifiedImageError) as error:
        raise StatisticsError(f"{shown}: not a readable image ({error}).") from error


def _converted(image: Any, mode: str) -> Any:
    """Return an image in a mode; of 16 bits the upper 8, where Pillow would make it white."""
    if image.mode.startswith("I"):
        import numpy as np
        from PIL import Image

        values = np.asarray(image)
        if values.max(initial=0) > 255:
            values = values >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image.convert(mode)


def beside(rows: Sequence[Row], column: str, source: str) -> Sequence[Row]:
    """Return the rows of a file with the pictures that they name found: beside it, or as named.

    Args:
        rows: as `read_rows` returns them.
        column: the column of pictures; values that name no file beside it stay as they are.
        source: the file; rows of folders and of functions are returned as they are.
    """
    if not Path(source).is_file():
        return rows
    folder = Path(source).parent

    def located(row: Row) -> Row:
        value = _held(row.get(column))
        # Path.is_file would raise where a text is too long for a name.
        found = isinstance(value, str) and os.path.isfile(folder / value)  # noqa: PTH113
        return {**row, column: folder / value} if found else row

    return [located(row) for row in rows]


def _held(value: Any) -> Any:
    """Return the bytes or the path that a mapping holds; other values as they are."""
    if not isinstance(value, Mapping):
        return value
    stored = cast("Mapping[str, Any]", value)
    return stored.get("bytes") or stored.get("path") or value
