"""Rows of files: JSON, CSV, TSV, parquet, lines of text, images, `datasets`, Python functions."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from eutectic.data.columns import Row
from eutectic.data.python_functions import imported
from eutectic.errors import MissingExtraError, RequestError, StatisticsError
from eutectic.storage import meant, view_once
from eutectic.storage.small_files import check_regular, parse_json, read_text

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
DATA_BYTES = 16 << 30  # of one file of rows, all of which are held in memory
_SPLITS = "dataset_dict.json"
# What folders of the splits of one data set are called; names in a row mean the same.
_SPLIT_NAMES = (
    ("train", "training"),
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval"),
)
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_KNOWN = (
    "*.jsonl, *.json, *.csv, *.tsv, *.parquet, *.txt (a text in each line), a folder of images, "
    "a folder written by `datasets`"
)


def read_rows(source: str, *, split: str | None = None, trust_code: bool = False) -> Sequence[Any]:
    """Return the rows of a data set, column -> value, of a file or folder by ending and content.

    Or of `module:function`, which `trust_code` allows to run: it is called without arguments and
    returns all rows, or all batches as tensors. `split`: of a `datasets` folder of several, or of a
    folder of images that holds a folder for each (`train/`, `validation/`, `test/`).
    """
    path = view_once(source)
    if split is not None:
        check_split([source], split)
    if not path.exists() and _FUNCTION.fullmatch(source):
        return _call(source, trust_code)
    if not path.exists():
        raise StatisticsError(
            f"{source}: no such file or folder.{meant(path)}\nKnown data: {_KNOWN}."
        )
    if path.is_dir():
        marks = ("dataset_info.json", "state.json", _SPLITS)
        is_dataset = any((path / mark).exists() for mark in marks)
        return _saved_dataset(path, split) if is_dataset else _images(path, split)
    readers = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": lambda p: _csv(p, ","),
        ".tsv": lambda p: _csv(p, "\t"),
        ".parquet": _parquet,
        ".txt": _lines,
    }
    if path.suffix.lower() not in readers:
        raise RequestError(f"{source}: unknown kind of data '{path.suffix}'.\nKnown: {_KNOWN}.")
    return readers[path.suffix.lower()](path)


def has_splits(source: str) -> bool:
    """Tell whether a source is a folder of several splits, of `datasets` or of images."""
    path = view_once(source)
    return (path / _SPLITS).is_file() or bool(image_splits(path))


def check_split(sources: Sequence[str], split: str) -> None:
    """Refuse a split that would be ignored, because none of the sources has any."""
    there = [s for s in sources if view_once(s).exists() or _FUNCTION.fullmatch(s)]
    if there and not any(map(has_splits, sources)):
        raise RequestError(
            f"{', '.join(there)}: data without splits, so there is no '{split}' to choose.\n"
            "Leave the split out; only folders of `datasets` or of images may hold several."
        )


def _call(source: str, trust_code: bool) -> Sequence[Any]:
    with imported(source, trust_code=trust_code) as function:
        rows: list[Any] = list(function())
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise StatisticsError(
                f"'{source}': item {number} is of type {type(row).__name__}.\n"
                "The function gives rows (column -> value) or batches (name -> tensor)."
            )
    return rows


def _jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    # Not splitlines(): JSON strings may hold other line separators as they are.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise StatisticsError(f"{path}, line {number}: not valid JSON ({error}).") from error
        if not isinstance(row, dict):
            raise StatisticsError(f"{path}, line {number}: not a JSON object.")
        rows.append(row)
    return rows


def _lines(path: Path) -> list[Row]:
    """Return a row for every line that is not blank: its text, without space around it."""
    lines = (line.strip() for line in _text(path).split("\n"))
    return [{"text": line} for line in lines if line]


def _json(path: Path) -> list[Row]:
    """Read a list of objects; files of that name often hold an object in every line, too."""
    text = _text(path)
    if not text.lstrip().startswith("["):
        return _jsonl(path)
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise StatisticsError(f"{path}: not valid JSON ({error}).") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise StatisticsError(f"{path}: item {number} is not a JSON object.")
    return rows


def _csv(path: Path, delimiter: str) -> list[Row]:
    text = _text(path)
    raw = delimiter == "\t" and _has_bare_quotes(text)
    quoting = csv.QUOTE_NONE if raw else csv.QUOTE_MINIMAL
    lines = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True, quoting=quoting)
    rows: list[Row] = []
    try:
        for row in lines:
            if None in row or None in row.values():
                columns = len(lines.fieldnames or ())
                raise StatisticsError(
                    f"{path}, line {lines.line_num}: not the {columns} columns of the first line."
                )
            rows.append(row)
    except csv.Error as error:
        raise StatisticsError(f"{path}, line {lines.line_num}: {error}.") from error
    return rows


def _has_bare_quotes(text: str) -> bool:
    """Tell whether quotation marks of tab-separated values belong to the texts, as in GLUE's files.

    There every line has the columns of the first, and some value begins with a mark that it does
    not end with. Read as quoting, such marks swallow the following lines.
    """
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
    except csv.Error:  # told with its line by who reads the rows
        return False
    starts = [value for row in rows for value in row if value.startswith('"')]
    one_width = len({len(row) for row in rows if row}) <= 1
    return one_width and any(len(value) == 1 or not value.endswith('"') for value in starts)


def _text(path: Path) -> str:
    try:
        return read_text(path, DATA_BYTES).removeprefix("\ufeff")
    except OSError as error:
        raise StatisticsError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise StatisticsError(f"{path}: cannot be read ({error}).") from error


def _parquet(path: Path) -> Sequence[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "eval", f"reading {path.name}") from error
    try:
        check_regular(path)
        return parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise StatisticsError(f"{path}: not a readable parquet file ({error}).") from error


def _saved_dataset(path: Path, split: str | None) -> Sequence[Row]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "eval", f"reading {path.name}") from error
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise StatisticsError(f"{path}: not a readable dataset ({error}).") from error
    if not isinstance(found, datasets.DatasetDict):
        return cast(Sequence[Row], found)
    if split is None or split not in found:
        raise _choice_of_splits(path, [str(name) for name in found])
    return cast(Sequence[Row], found[split])


def _choice_of_splits(path: Path, names: Sequence[str]) -> RequestError:
    return RequestError(
        f"{path}: has the splits {', '.join(names)}; name one of them with --split.\n"
        "In a task of `eutectic evaluate`: data: {proxy: {path: …, subset: NAME}}."
    )


def _images(path: Path, split: str | None) -> list[Row]:
    """Return the images of a folder, or those of one of its splits."""
    names = image_splits(path)
    if not names:
        return _image_folder(path)
    if split is None and len(names) == 1:
        return _image_folder(path / names[0])
    alike = next((group for group in _SPLIT_NAMES if split in group), (split,))
    found = [n for n in names if n == split] or [n for n in names if n.lower() in alike]
    if len(found) != 1:
        raise _choice_of_splits(path, names)
    return _image_folder(path / found[0])


def image_splits(path: Path) -> list[str]:
    """Return the names of the folders that are splits of a folder of images, if it has any.

    Classes are seldom called `train` and `test`: folders are splits where all have such names, or
    two have and all hold folders of classes. One alone must hold folders of classes.
    """
    if not path.is_dir():
        return []
    here = sorted(path.iterdir())
    folders = [f for f in here if f.is_dir() and not f.name.startswith((".", "__"))]
    known = {name for group in _SPLIT_NAMES for name in group}
    named = [f.name for f in folders if f.name.lower() in known]
    if not named or any(f.suffix.lower() in IMAGES and f.is_file() for f in here):
        return []
    nested = all(any(child.is_dir() for child in f.iterdir()) for f in folders)
    whole = len(named) == len(folders)
    splits = (whole and len(named) > 1) or (nested and (whole or len(named) > 1))
    return [f.name for f in folders] if splits else []


def _image_folder(path: Path) -> list[Row]:
    """Return one row per image, in the order of names; the label is the folder it lies in."""
    images = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in IMAGES and f.is_file()]
    rows: list[Row] = [
        {"image": file} if file.parent == path else {"image": file, "label": file.parent.name}
        for file in images
    ]
    if not rows:
        raise StatisticsError(f"{path}: holds no images.\nKnown data: {_KNOWN}.")
    return rows
