"""Splits of a folder of images are what they are; columns of texts hold texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eutectic.data.columns import Columns, check_columns
from eutectic.data.row_files import check_split, has_splits, read_rows
from eutectic.errors import RequestError


def images(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return str(root)


def read(source: str, split: str | None = None) -> list[tuple[str, str | None]]:
    rows = read_rows(source, split=split)
    return [(str(Path(row["image"]).relative_to(source)), row.get("label")) for row in rows]


def test_splits_are_chosen_and_never_read_together(tmp_path: Path):
    source = images(
        tmp_path, "train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "test/dog/d.png"
    )
    assert has_splits(source)
    assert read(source, "train") == [("train/cat/a.png", "cat"), ("train/dog/b.png", "dog")]
    # By the other names of the same split, too.
    assert read(source, "val") == read(source, "validation") == [("val/cat/c.png", "cat")]
    for split in (None, "holdout"):
        with pytest.raises(RequestError, match="has the splits test, train, val; name one of them"):
            read_rows(source, split=split)


def test_splits_without_classes_and_beside_others(tmp_path: Path):
    flat = images(tmp_path / "flat", "train/a.png", "test/b.png")
    assert read(flat, "test") == [("test/b.png", None)]
    more = images(tmp_path / "more", "Train/x/a.png", "Test/x/b.png", "unlabeled/x/c.png")
    assert read(more, "train") == [("Train/x/a.png", "x")]
    assert read(more, "unlabeled") == [("unlabeled/x/c.png", "x")]


def test_one_split_alone_needs_no_choice(tmp_path: Path):
    source = images(tmp_path, "train/cat/a.png", "train/dog/b.png")
    assert read(source) == read(source, "train") == [
        ("train/cat/a.png", "cat"), ("train/dog/b.png", "dog"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        ("train/a.png", "car/b.png", "bus/c.png"),  # vehicles
        ("cat/a.png", "dog/b.png"),
        ("test/a.png",),  # one class
        ("train/x/a.png", "c.png"),
    ],
)
def test_classes_are_no_splits(tmp_path: Path, names: tuple[str, ...]):
    source = images(tmp_path, *names)
    assert not has_splits(source) and len(read_rows(source)) == len(names)
    with pytest.raises(RequestError, match="without splits"):
        check_split([source], "train")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["a", "b"], "holds a list of str, no text"),
        ({"en": "a"}, "holds a dict, no text"),
        (b"a", "holds a bytes, no text"),
        ([{"role": "user", "content": "a"}], "apply_chat_template"),
        ([{"from": "human", "value": "a"}], "Messages of chats are not read as texts"),
    ],
)
def test_what_is_no_text_is_refused_with_its_column_and_type(value: Any, said: str):
    rows = [{"words": "a"}, {"words": 1.5}, {"words": value}]
    with pytest.raises(RequestError, match="row 3: the column 'words'") as caught:
        check_columns(rows, Columns(text="words"), ["text"], advice=str)
    assert said in str(caught.value)


def test_second_texts_too(tmp_path: Path):
    from eutectic.data.encoded_rows import token_ids

    class Task:
        kind: Any = "pair-classification"
        columns = Columns()

    rows = json.loads('[{"text": "a", "text_pair": ["b"]}]')
    with pytest.raises(RequestError, match="row 1: the column 'text_pair' holds a list of str"):
        token_ids(Task(), rows, None, 8)
