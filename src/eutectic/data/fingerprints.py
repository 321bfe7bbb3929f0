"""Identities of rows and of examples: what counts as the same input, whatever its file or batch."""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eutectic.data.columns import INPUTS, Row, RowsOfTask, answer_of, inputs_of, messages_of
from eutectic.data.images import open_image
from eutectic.errors import RequestError, StatisticsError
from eutectic.models.batches import (
    IGNORED_LABEL,
    LABEL_KEYS,
    Batch,
    decoder_mask,
    sample_count,
    tensors_by_name,
)

_CONTENT = ("text", "text_pair", "source", "image")  # of the rows of functions, where named so


def row_key(task: RowsOfTask, row: Row) -> bytes:
    """Return the identity of a row's inputs, 16 bytes; labels and further columns play no part.

    Texts count after Unicode NFKC, case folding, removal of invisible characters and collapsing of
    white space; images as their pixels in RGB, whatever the file. Rows of functions count as their
    content, or as all columns where they have none; unreadable images as what stands in the row.
    """
    ended = b"".join(value + b"\0" for value in _inputs(task, row))
    return hashlib.sha256(ended).digest()[:16]


def data_hash(task: RowsOfTask, rows: Sequence[Row]) -> str:
    """Return the identity of rows in order, with the inputs as they stand and the answers."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row_key(task, row))
        answer = answer_of(task, row)
        texts = [c for c in inputs_of(task, row) if c != "image"]
        columns = [getattr(task.columns, c) for c in (*texts, *([answer] if answer else []))]
        if task.kind == "function":  # it may read anything
            columns = sorted(set(row) - {task.columns.image})
        for column in columns:
            digest.update(f"{row.get(column)!r}\0".encode())
    return digest.hexdigest()


def example_hashes(batch: Batch, paired: bool) -> tuple[list[int], list[int]]:
    """Return two 63-bit hashes per example: of its inputs, and of inputs and labels.

    Padding does not enter: what the masks exclude is dropped first, so that an example has one
    hash in any batch.
    """
    count = sample_count(batch)
    items = {
        key: value.detach().cpu()
        for key, value in tensors_by_name(batch).items()
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == count
    }
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


def _inputs(task: RowsOfTask, row: Row) -> list[bytes]:
    columns = inputs_of(task, row) if task.kind in INPUTS else _CONTENT
    values = {column: row.get(getattr(task.columns, column)) for column in columns}
    content = {column: value for column, value in values.items() if value is not None}
    if task.kind == "function" and not content:
        return [f"{key}={_compared(value)}".encode() for key, value in sorted(row.items())]
    return [
        part
        for column, value in content.items()
        for part in (_pixels(task, value) if column == "image" else [_compared(value).encode()])
    ]


def _pixels(task: RowsOfTask, value: Any) -> list[bytes]:
    """Return an image's size and pixels; what only a function knows to read stands for itself."""
    try:
        image = open_image(value)
        return [str(image.size).encode(), image.tobytes()]
    except (StatisticsError, AttributeError, TypeError, ValueError) as error:
        if task.kind == "function":
            return [value if isinstance(value, bytes) else repr(value).encode()]
        if isinstance(error, StatisticsError):
            raise
        raise RequestError(
            f"the column '{task.columns.image}' holds a value of type {type(value).__name__}.\n"
            "Wanted: a file's name, its bytes, or an image."
        ) from None


def _compared(value: Any) -> str:
    """Return a text as it is compared; what stood apart is composed after all is removed."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        turns = messages_of(value, "a row")
        value = "\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in turns)
    text = unicodedata.normalize("NFKC", str(value)).casefold()
    if not text.isascii():
        text = unicodedata.normalize("NFKC", "".join(c for c in text if not _invisible(c)))
    return " ".join(text.split())


def _invisible(character: str) -> bool:
    """Tell whether a character is format only: joiners, soft hyphens, byte order marks."""
    variation = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    return variation or character == "\u034f" or unicodedata.category(character) == "Cf"
