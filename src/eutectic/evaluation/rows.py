"""The rows of a task's splits: shares of a file, identities of rows, proof that splits differ."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eutectic.errors import Fault, RequestError, StatisticsError, TaskError
from eutectic.evaluation.schema import SPLITS, Part, Split, Task
from eutectic.statistics.encode import beside, open_image
from eutectic.statistics.rows import Row, half_paired, read_rows

INPUTS: Mapping[str, tuple[str, ...]] = {
    "text-classification": ("text", "text_pair"),
    "pair-classification": ("text", "text_pair"),
    "regression": ("text", "text_pair"),
    "image-classification": ("image",),
    "sequence-to-sequence": ("source",),
    "language-model": ("text",),
}
_CONTENT = ("text", "text_pair", "source", "image")  # of the rows of functions, where named so
_OPTIONAL = {"text-classification": ("text_pair",), "regression": ("text_pair",)}
ANSWERS: Mapping[str, str] = {
    "text-classification": "label",
    "pair-classification": "label",
    "regression": "label",
    "image-classification": "label",
    "sequence-to-sequence": "target",
}


def split_rows(task: Task, split: Split, limit: int | None = None) -> list[Row]:
    """Return the rows of one split in the order of the file, the first `limit` of them.

    Of a folder of images, which holds one class after the other, the first of every class in turn.

    Raises:
        RequestError: the task has no such split, a column is missing, or no row is left.
        StatisticsError, MissingExtraError: as `read_rows`.
    """
    part = task.data.get(split)
    if part is None:
        raise RequestError(
            f"task '{task.name}' has no split '{split}'; it has {', '.join(task.data) or 'none'}."
        )
    rows = _part_rows(task, split, part)
    if not rows:
        raise RequestError(f"task '{task.name}': the split '{split}' ({part.path}) has no rows.")
    if limit is not None and task.kind == "image-classification" and Path(part.path).is_dir():
        rows = _in_turn(rows, task.columns.label)
    return rows if limit is None else rows[:limit]


def _in_turn(rows: Sequence[Row], column: str) -> list[Row]:
    """Return the first row of every class, then the second, and so on."""
    seen: Counter[str] = Counter()
    places: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        label = str(row.get(column))
        places.append((seen[label], number))
        seen[label] += 1
    return [rows[number] for _, number in sorted(places)]


def row_key(task: Task, row: Row) -> bytes:
    """Return the identity of a row's inputs, 16 bytes; labels and further columns play no part.

    Texts count after Unicode NFKC, case folding, removal of invisible characters and collapsing of
    white space, the two of a pair in their order; images as their pixels in RGB, whatever the file.
    Rows of functions count as their content (text, text_pair, source, image, by the task's names of
    columns), or as all columns where they have none of these; an image that is no readable file
    counts as what stands in the row.
    """
    digest = hashlib.sha256()
    for value in _inputs(task, row):
        digest.update(value)
        digest.update(b"\0")
    return digest.digest()[:16]


def data_hash(task: Task, rows: Sequence[Row]) -> str:
    """Return the identity of rows in order, with the inputs as they stand and the answers."""
    digest = hashlib.sha256()
    answer = ANSWERS.get(task.kind)
    for row in rows:
        digest.update(row_key(task, row))
        texts = [c for c in INPUTS.get(task.kind, ()) if c != "image"]
        columns = [getattr(task.columns, c) for c in (*texts, *([answer] if answer else []))]
        if task.kind == "function":  # it may read anything
            columns = sorted(set(row) - {task.columns.image})
        for column in columns:
            digest.update(f"{row.get(column)!r}\0".encode())
    return digest.hexdigest()


def check_disjoint(
    task: Task, further_proxy: Sequence[str] = (), *, trust_code: bool = False
) -> dict[str, int]:
    """Return split -> number of rows; the splits share no row.

    Args:
        task: the task; all of its splits are read.
        further_proxy: files that count as proxy too, such as those given to `collect`.
        trust_code: allow `module:function` among them.

    Raises:
        TaskError: two splits share rows; names how many, and one of them.
        RequestError: proxy files for a task whose rows lm-evaluation-harness has.
    """
    found = disjoint_keys(task, further_proxy, trust_code=trust_code)
    return {split: len(keys) for split, keys in found.items()}


def disjoint_keys(
    task: Task, further_proxy: Sequence[str] = (), *, trust_code: bool = False
) -> dict[Split, frozenset[bytes]]:
    """Return split -> identities of its rows, of splits that have any; see `check_disjoint`."""
    if further_proxy and task.kind == "lm-eval":
        raise RequestError(
            f"task '{task.name}' takes its rows from lm-evaluation-harness; they cannot be "
            f"compared with {further_proxy[0]}."
        )
    found: dict[Split, dict[bytes, Row]] = {}
    for split in SPLITS:
        rows = split_rows(task, split) if split in task.data else []
        found[split] = {row_key(task, row): row for row in rows}
    for path in further_proxy:
        rows = _checked(task, _read(task, path, trust_code=trust_code), path)
        found["proxy"].update({row_key(task, row): row for row in rows})
    faults: list[Fault] = []
    for i, first in enumerate(SPLITS):
        for second in SPLITS[i + 1 :]:
            shared = found[first].keys() & found[second].keys()
            if shared:
                example = _shown(task, found[second][min(shared)])
                what = (
                    f"{first} and {second} share {len(shared)} of {len(found[second])} different "
                    f"{second} rows, such as {example}."
                )
                faults.append(Fault("shared_rows", what))
    if faults:
        raise TaskError(faults, f"task '{task.name}'")
    return {split: frozenset(rows) for split, rows in found.items() if rows}


def _part_rows(task: Task, split: Split, part: Part) -> list[Row]:
    rows = _checked(task, _read(task, part.path, part.subset), part.path)
    if part.share is None:
        return rows
    start = 0.0
    for earlier in SPLITS[: SPLITS.index(split)]:
        other = task.data.get(earlier)
        if other is not None and (other.path, other.subset) == (part.path, part.subset):
            start += other.share or 0.0
    stop = start + part.share
    # By content, so that equal rows fall on the same side and added rows move no other.
    return [row for row in rows if start <= _position(row_key(task, row)) < stop]


def _read(
    task: Task, path: str, subset: str | None = None, *, trust_code: bool = False
) -> Sequence[Row]:
    """Return the rows of a file or folder; pictures that they name lie relative to it."""
    rows = read_rows(path, split=subset, trust_code=trust_code)
    return beside(rows, task.columns.image, path) if task.kind == "image-classification" else rows


def _position(key: bytes) -> float:
    return int.from_bytes(key[:6], "big") / 2**48


def _checked(task: Task, rows: Sequence[Any], path: str) -> list[Row]:
    """Return the rows as a list, all with the columns that the task needs."""
    # A column with a name of its own is meant to be there.
    optional = [c for c in _OPTIONAL.get(task.kind, ()) if getattr(task.columns, c) == c]
    wanted = [c for c in INPUTS.get(task.kind, ()) if c not in optional]
    if task.kind in ANSWERS and "proxy" not in _splits_of(task, path):
        wanted.append(ANSWERS[task.kind])
    listed = list(rows)
    for column in _OPTIONAL.get(task.kind, ()):
        name = getattr(task.columns, column)
        if mixed := half_paired(listed, name):
            raise RequestError(
                f"task '{task.name}': {path}, row {mixed[1]} has no '{name}', row {mixed[0]} has.\n"
                "Rows are pairs or single texts; make them two tasks."
            )
    for number, row in enumerate(listed, 1):
        for column in wanted:
            name = getattr(task.columns, column)
            if name in row and row[name] is None:
                raise RequestError(
                    f"task '{task.name}': {path}, row {number} is empty in the column '{name}'."
                )
            if name not in row:
                raise RequestError(
                    f"task '{task.name}': {path}, row {number} has no column '{name}'; it has "
                    f"{', '.join(map(str, row))}.\nName the right one in the task: "
                    f"columns: {{{column}: NAME}}."
                )
    return listed


def _splits_of(task: Task, path: str) -> set[str]:
    named = {split for split, part in task.data.items() if part.path == path}
    return named or {"proxy"}


def _inputs(task: Task, row: Row) -> list[bytes]:
    if task.kind == "function" and not _content(task, row):
        return [f"{key}={_plain(value)}".encode() for key, value in sorted(row.items())]
    found: list[bytes] = []
    for column, value in _content(task, row).items():
        if column == "image":
            found += _picture(task, value)
        else:
            found.append(_plain(value).encode())
    return found


def _picture(task: Task, value: Any) -> list[bytes]:
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
            f"task '{task.name}': the column '{task.columns.image}' holds a value of type "
            f"{type(value).__name__}.\nWanted: a file's name, its bytes, or an image."
        ) from None


def _content(task: Task, row: Row) -> dict[str, Any]:
    """Return column -> value of what a row's identity is made of."""
    columns = INPUTS.get(task.kind, _CONTENT)
    values = {column: row.get(getattr(task.columns, column)) for column in columns}
    return {column: value for column, value in values.items() if value is not None}


def _plain(value: Any) -> str:
    """Return a text as it is compared; what stood apart is composed after all is removed."""
    text = unicodedata.normalize("NFKC", str(value)).casefold()
    if not text.isascii():
        seen = "".join(c for c in text if not _invisible(c))
        text = unicodedata.normalize("NFKC", seen)
    return " ".join(text.split())


def _invisible(character: str) -> bool:
    """Tell whether a character is format only: joiners, soft hyphens, byte order marks."""
    variation = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    return variation or character == "\u034f" or unicodedata.category(character) == "Cf"


def _shown(task: Task, row: Row) -> str:
    columns = INPUTS.get(task.kind)
    names = [getattr(task.columns, c) for c in columns] if columns else list(row)
    text = " / ".join(str(row[name]) for name in names if row.get(name) is not None)
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
