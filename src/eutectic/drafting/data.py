"""Files of rows: whose they are, which splits they hold, how their columns are called."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from eutectic.data.row_files import IMAGES, image_splits
from eutectic.errors import CheckpointError
from eutectic.models.task_kinds import PICTURES, TaskKind
from eutectic.storage.small_files import open_regular, read_json

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
# Texts that lie beside models and data and are neither.
_NO_ROWS = re.compile(
    r"(?i)(vocab|merges|added_tokens|readme|licen[cs]e|notice|requirements|copying).*"
)
_DATA_FOLDERS = re.compile(r"(?i)(data|datasets?|tasks|evals?|proxies|proxy)")
_HEAD_BYTES = 1 << 20  # of a file, of which the names of columns are read
_SPLITS: Mapping[str, tuple[str, ...]] = {
    "proxy": ("proxy", "calibration", "calib", "unlabelled", "unlabeled", "train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Words of paths that tell no expert from another.
_USUAL = {w for words in _SPLITS.values() for w in words} | {"data", "dataset", "datasets", "tasks"}
_CORPUS = re.compile(r"(?i)(^|[^a-z])(corpus|documents|docs|passages)($|[^a-z])")
_CALLED: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "sentence1", "premise", "question1", "review", "content")
    + ("question", "document", "comment", "body", "title", "sentence_0", "query", "anchor"),
    "text_pair": ("text_pair", "sentence2", "hypothesis", "question2", "answer", "context")
    + ("sentence_1", "positive"),
    "label": ("label", "labels", "class", "category", "score", "target", "answer"),
    "source": ("source", "src", "input", "inputs", "question", "document", "article", "prompt"),
    "target": ("target", "tgt", "output", "outputs", "answer", "summary", "completion"),
    "image": ("image", "img", "file_name", "path", "file"),
    "messages": ("messages", "conversations", "conversation", "chat"),
    "prompt": ("prompt", "instruction", "question"),
    "completion": ("completion", "response", "output", "answer"),
    "relevant": ("relevant", "relevant_docs", "relevant_ids", "positives", "corpus-id", "qrels"),
}
_FIELDS: Mapping[TaskKind, tuple[str, ...]] = {
    "text-classification": ("text", "text_pair", "label"),
    "pair-classification": ("text", "text_pair", "label"),
    "regression": ("text", "text_pair", "label"),
    "sentence-similarity": ("text", "text_pair", "label"),
    "retrieval": ("text", "relevant"),
    **dict.fromkeys(PICTURES, ("image", "label")),
    "sequence-to-sequence": ("source", "target"),
    "language-model": ("text",),
}


@dataclass(frozen=True)
class Rows:
    """A file or folder of rows."""

    path: Path
    split: str | None  # that its name tells; None: all of them
    inside: tuple[str, ...] = ()  # splits in a folder of `datasets` or of images
    columns: tuple[str, ...] = ()  # of files


def is_data(path: Path) -> bool:
    """Tell whether a path is a file of rows, a folder written by `datasets`, or one of images."""
    if path.is_dir():
        marks = ("dataset_dict.json", "dataset_info.json")
        return any((path / mark).is_file() for mark in marks) or _holds_images(path)
    return path.suffix.lower() in ENDINGS and not _NO_ROWS.fullmatch(path.stem)


def _holds_images(folder: Path) -> bool:
    """Tell whether the first entries of a folder's first folders, or of those below, are images."""
    for _ in range(2):
        inner = next((p for p in _listed(folder) if p.is_dir()), None)
        if inner is None:
            return False
        if any(p.suffix.lower() in IMAGES for p in _listed(inner)[:5]):
            return True
        folder = inner
    return False


def look(path: Path) -> Rows:
    """Return what a name and the first bytes of a file of rows tell."""
    found = {word: split for split, words in _SPLITS.items() for word in words}
    for name in (path.stem, path.parent.name):  # sst2.test.jsonl, proxy/sst2.jsonl
        words = [w for w in re.split(r"[^a-z]+", name.lower()) if w in found]
        if words:
            break
    split = found[words[-1]] if words else None
    if path.is_dir():
        names: list[str] = []
        with suppress(CheckpointError):
            told = read_json(path / "dataset_dict.json", CheckpointError).get("splits")
            names = [str(name) for name in told] if isinstance(told, list) else []
        names = names or image_splits(path)
        return Rows(path, split, inside=tuple(names))
    return Rows(path, split, columns=tuple(_columns(path)))


def _columns(path: Path) -> list[str]:
    """Return the names of a file's columns; none where its first bytes do not tell."""
    ending = path.suffix.lower()
    with suppress(OSError, ValueError, csv.Error, StopIteration, ImportError, RecursionError):
        if ending == ".parquet":
            import pyarrow.parquet as parquet

            return [str(name) for name in parquet.read_schema(path).names]
        with open(open_regular(path), "rb") as file:  # noqa: PTH123 - a descriptor
            head = file.read(_HEAD_BYTES).decode("utf-8-sig", errors="ignore")
        if ending == ".txt":
            return ["text"]
        if ending in (".csv", ".tsv"):
            rows = csv.reader(head.splitlines(), delimiter="," if ending == ".csv" else "\t")
            return next(rows)
        text = head.lstrip().removeprefix("[").lstrip()
        row, _ = json.JSONDecoder().raw_decode(text)
        return [str(name) for name in row] if isinstance(row, dict) else []
    return []


def belongs_to(rows: Rows, names: Sequence[str]) -> str | None:
    """Return the expert whose name a path holds, the longest where several do.

    Else the one of whose words alone a file or its folder holds one: `cook.jsonl` is of
    `lora-cook` where there is `lora-chess` beside it, and no other cook.
    """
    text = "/".join(rows.path.parts[-3:]).lower()
    within = [
        name
        for name in names
        if re.search(rf"(?<![a-z0-9]){re.escape(name.lower())}(?![a-z0-9])", text)
    ]
    if within:
        return max(within, key=len)
    words = {name: _words(name) for name in names}
    called = _words(rows.path.stem) | _words(rows.path.parent.name)
    told = [
        name
        for name, own in words.items()
        if (own - {w for n, other in words.items() if n != name for w in other}) & called
    ]
    return told[0] if len(told) == 1 and len(words) > 1 else None


def _words(name: str) -> set[str]:
    """Return the words of a name that may tell an expert: no splits, no numbers, no letters."""
    found = re.split(r"[^a-z0-9]+", name.lower())
    return {w for w in found if len(w) > 2 and not w.isdigit() and w not in _USUAL}


def holds_corpus(rows: Rows) -> bool:
    """Tell whether rows are the documents of a retrieval task, by their name and columns."""
    columns = {column.lower() for column in rows.columns}
    return bool(_CORPUS.search(rows.path.stem)) and not columns & set(_CALLED["relevant"])


def beside(names: Sequence[str], folders: Sequence[Path]) -> list[Path]:
    """Return files of rows that are called like an expert, in or one level below some folders.

    Documents of retrieval tasks too, whose they may be.
    Two levels below where the first is called like one of data: `data/<expert>/test.jsonl`.
    """
    found: list[Path] = []
    for folder in dict.fromkeys(folders):
        inner = _listed(folder)
        deeper = [q for p in inner if p.is_dir() and not _is_known(p) for q in _listed(p)]
        called = [p for p in inner if p.is_dir() and _DATA_FOLDERS.fullmatch(p.name)]
        # A .json may be anything; such a file of rows has to be named.
        rows = [p for p in (*inner, *deeper) if p.suffix.lower() != ".json" and is_data(p)]
        rows += [p for one in called for p in within(one, names)]
        found += [p for p in rows if belongs_to(o := look(p), names) or holds_corpus(o)]
    return list(dict.fromkeys(found))


def within(path: Path, names: Sequence[str]) -> list[Path]:
    """Return the files and folders of rows at a path, or at most two levels below a folder.

    A folder of folders of images is one data set, unless these are called like experts.
    """
    if not path.is_dir() or (is_data(path) and not _holds_experts(path, names)):
        return [path]
    inner = [p for p in _listed(path) if not _is_model(p)]
    deeper = [q for p in inner if p.is_dir() and not is_data(p) for q in _listed(p)]
    return [p for p in (*inner, *deeper) if p.suffix.lower() != ".json" and is_data(p)]


def _holds_experts(folder: Path, names: Sequence[str]) -> bool:
    """Tell whether a folder is of several data sets, each called like an expert."""
    called = {p.name.lower() for p in _listed(folder) if p.is_dir()}
    return bool(called & {name.lower() for name in names})


def _is_known(folder: Path) -> bool:
    """Tell whether a folder is rows or a model as a whole, and not looked into."""
    return is_data(folder) or _is_model(folder)


def _is_model(folder: Path) -> bool:
    return folder.is_dir() and any(p.name.endswith("config.json") for p in _listed(folder))


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError:
        return []


def _fields(kind: TaskKind, present: Sequence[str]) -> tuple[str, ...]:
    """Return the fields that rows with such columns fill; language models have three forms."""
    if kind == "language-model" and "text" not in present:
        for form in (("messages",), ("prompt", "completion")):
            if all(any(c.lower() in _CALLED[field] for c in present) for field in form):
                return form
    return _FIELDS.get(kind, ())


def columns_for(kind: TaskKind, present: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return field -> column where it is not called like the field, and fields without a column.

    A second text is optional, but for pairs. Each column is taken once.
    """
    renamed: dict[str, str] = {}
    lacking: list[str] = []
    taken: set[str] = set()
    for field in _fields(kind, present):
        exact = [c for c in present if c == field]
        near = [c for name in _CALLED[field] for c in present if c.lower() == name]
        found = next((c for c in (*exact, *near) if c not in taken), None)
        if found is None:
            if field != "text_pair" or kind in ("pair-classification", "sentence-similarity"):
                lacking.append(field)
            continue
        taken.add(found)
        if found != field:
            renamed[field] = found
    return renamed, lacking
