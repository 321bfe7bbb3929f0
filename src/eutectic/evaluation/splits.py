"""The rows of a task's splits: shares of a file, and the check that splits share no row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from eutectic.data.columns import (
    ANSWERS,
    INPUTS,
    Row,
    check_columns,
    check_pairs,
    required_inputs,
)
from eutectic.data.fingerprints import row_key
from eutectic.data.images import locate_images
from eutectic.data.row_files import read_rows
from eutectic.errors import Fault, RequestError, TaskError
from eutectic.evaluation.task_files import SPLITS, Part, Split, Task


def split_rows(task: Task, split: Split, limit: int | None = None) -> list[Row]:
    """Return the rows of one split in the order of the file, the first `limit` of them.

    Of a folder of images, which holds one class after the other, the first of every class in turn.
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


def check_disjoint(
    task: Task, further_proxy: Sequence[str] = (), *, trust_code: bool = False
) -> dict[Split, frozenset[bytes]]:
    """Return split -> identities of its rows, of splits that have any; they share no row."""
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
        rows = _read(task, path, trust_code=trust_code)
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
    rows = _read(task, part.path, part.subset)
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
) -> list[Row]:
    """Return the rows of a file or folder, all with the columns that the task needs."""
    rows = read_rows(path, split=subset, trust_code=trust_code)
    if task.kind == "image-classification":
        rows = locate_images(rows, task.columns.image, path)
    wanted = required_inputs(task)
    splits = {split for split, part in task.data.items() if part.path == path} or {"proxy"}
    if task.kind in ANSWERS and "proxy" not in splits:
        wanted.append(ANSWERS[task.kind])
    listed = list(rows)
    where = f"task '{task.name}': {path}, "
    check_pairs(listed, task, where)
    check_columns(listed, task.columns, wanted, where=where, advice=_advice)
    return listed


def _position(key: bytes) -> float:
    return int.from_bytes(key[:6], "big") / 2**48


def _advice(field: str) -> str:
    return f"Name the right one in the task: columns: {{{field}: NAME}}."


def _shown(task: Task, row: Row) -> str:
    columns = INPUTS.get(task.kind)
    names = [getattr(task.columns, c) for c in columns] if columns else list(row)
    text = " / ".join(str(row[name]) for name in names if row.get(name) is not None)
    return repr(text if len(text) <= 80 else f"{text[:79]}…")
