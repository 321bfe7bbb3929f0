"""Guards data for the command line: every format gives the same rows, faults name their place."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eutectic.data.columns import ClassLabels, Columns
from eutectic.data.encoded_rows import BatchOptions, EncodedRows, open_batches
from eutectic.data.row_files import read_rows
from eutectic.errors import RequestError, StatisticsError

ROWS = [{"text": "one,\u2028two", "label": "a"}, {"text": 'three "four"', "label": "b"}]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets
    import pandas

    frame = pandas.DataFrame(ROWS)
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, "", ""]), encoding="utf-8")
    (tmp_path / "lines.json").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "list.json").write_text(f"[{', '.join(lines)}]", encoding="utf-8")
    frame.to_csv(tmp_path / "x.csv", index=False)
    frame.to_csv(tmp_path / "x.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "x.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    splits.save_to_disk(tmp_path / "splits")

    for name in ("x.jsonl", "list.json", "lines.json", "x.csv", "x.tsv", "x.parquet", "saved"):
        assert list(read_rows(str(tmp_path / name))) == ROWS, name
    assert list(read_rows(str(tmp_path / "splits"), split="train")) == ROWS
    with pytest.raises(RequestError, match="splits train; name one"):
        read_rows(str(tmp_path / "splits"))
    for name in ("x.jsonl", "x.parquet", "saved", "some.module:rows"):
        with pytest.raises(RequestError, match="data without splits, so there is no 'train'"):
            read_rows(name if ":" in name else str(tmp_path / name), split="train")


def test_quotation_marks_of_tab_separated_values(tmp_path: Path) -> None:
    file = tmp_path / "x.tsv"
    file.write_text('text\tlabel\n"he said\t0\n" and left\t1\n"all of it"\t0\n')
    assert [row["text"] for row in read_rows(str(file))] == [
        '"he said',
        '" and left',
        '"all of it"',
    ]
    file.write_text('text\tlabel\n"two\nlines"\t0\n"a ""word"""\t1\n')
    assert [row["text"] for row in read_rows(str(file))] == ["two\nlines", 'a "word"']


def test_images_are_labelled_by_their_folder(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat/b.png", "cat/a.jpg", "dog/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    rows = read_rows(str(tmp_path))
    assert [(r["image"].name, r["label"]) for r in rows] == [
        ("a.jpg", "cat"),
        ("b.png", "cat"),
        ("c.png", "dog"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n{"text": ', "line 2: not valid JSON"),
        ("x.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("x.json", "[1]\n", "item 1 is not a JSON object"),
        ("x.json", '[{"text": "a"}', "not valid JSON"),
        ("x.csv", "text,label\na,b\nc\n", "line 3: not the 2 columns"),
        ("x.csv", "text,label\na,b,c\n", "line 2: not the 2 columns"),
        ("x.csv", 'text\n"a\n', "line 1: unexpected end"),
        ("x.parquet", "no parquet", "not a readable parquet file"),
        ("x.csv", b"text\n\xff\xfe", "cannot be read"),
    ],
)
def test_damaged_files_name_their_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StatisticsError, match=message):
        read_rows(str(path))


def test_unknown_and_missing_data(tmp_path: Path) -> None:
    (tmp_path / "x.xlsx").write_text("?")
    with pytest.raises(RequestError, match=r"unknown kind of data '\.xlsx'"):
        read_rows(str(tmp_path / "x.xlsx"))
    with pytest.raises(StatisticsError, match="no such file"):
        read_rows(str(tmp_path / "nothing.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(StatisticsError, match="holds no images"):
        read_rows(str(tmp_path / "empty"))


def test_code_runs_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proxy_rows_module.py").write_text(
        "def rows():\n    yield {'text': 'a'}\ndef numbers():\n    return [1]\n"
    )
    monkeypatch.chdir(tmp_path)  # where the command is started
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    with pytest.raises(RequestError, match="--trust-code"):
        read_rows("proxy_rows_module:rows")
    assert "proxy_rows_module" not in sys.modules
    assert read_rows("proxy_rows_module:rows", trust_code=True) == [{"text": "a"}]
    with pytest.raises(RequestError, match="cannot be imported"):
        read_rows("proxy_rows_module:others", trust_code=True)
    with pytest.raises(StatisticsError, match="item 1 is of type int"):
        read_rows("proxy_rows_module:numbers", trust_code=True)


LABELS = ClassLabels({"bad": 0, "good": 1})


def fake_tokenizer(**options: Any) -> dict[str, list[list[int]]]:
    """Splits at spaces; a token's id is its length."""
    texts = options["text_target"] if "text_target" in options else options["text"]
    pairs = options.get("text_pair") or [""] * len(texts)
    ids = [[len(w) for w in f"{t} {p}".split()] for t, p in zip(texts, pairs, strict=True)]
    return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


def encoded(rows: list[dict[str, Any]], kind: Any, **columns: str) -> EncodedRows:
    return EncodedRows(rows, kind, fake_tokenizer, Columns(**columns), 2, 8, LABELS)


def test_batches_can_be_read_again_and_keep_their_order() -> None:
    data = encoded([{"text": "a " * n, "label": 1} for n in (1, 2, 3)], "text-classification")
    first, again = list(data), list(data)
    assert len(data) == len(first) == 2
    assert [b["input_ids"].shape[1] for b in first] == [2, 3]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, again, strict=True) for k in a)


def test_labels_by_name_index_or_number() -> None:
    rows = [{"text": "a", "label": value} for value in ("good", 0)]
    (batch,) = encoded(rows, "text-classification")
    assert batch["labels"].tolist() == [1, 0]
    (batch,) = encoded([{"text": "a", "label": "0.5"}], "text-classification")
    assert batch["labels"].dtype == torch.float32
    with pytest.raises(StatisticsError, match="row 1: the model knows no label 'ugly'.*\n.*bad"):
        list(encoded([{"text": "a", "label": "ugly"}], "text-classification"))
    (batch,) = encoded(rows, "feature-extraction")  # for a head that lies beside the model
    assert batch["labels"].tolist() == [1, 0]


def test_labels_are_looked_at_only_where_they_are_needed() -> None:
    rows = [{"text": "a", "label": value} for value in ("ugly", 9)]
    unread = dataclasses.replace(encoded(rows, "text-classification"), labels=None)
    (batch,) = unread
    assert "labels" not in batch


@pytest.mark.parametrize("label", [2, -1, 0.5, "7", "0.5", math.nan])
def test_labels_that_are_no_class_are_refused(label: Any) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": label}]
    two = ClassLabels(LABELS.names, 2)
    data = dataclasses.replace(encoded(rows, "text-classification"), labels=two)
    fault = f"row 2: the model knows no label '{label}'.*\n.*0 to 1"
    with pytest.raises(StatisticsError, match=fault):
        list(data)
    whole = [{"text": "a", "label": value} for value in (1.0, "1.0", True, "good")]
    batches = dataclasses.replace(encoded(whole, "text-classification"), labels=two)
    labels = torch.cat([batch["labels"] for batch in batches])
    assert labels.tolist() == [1, 1, 1, 1] and labels.dtype == torch.int64


def test_an_empty_cell_is_named() -> None:
    with pytest.raises(RequestError, match="row 2 is empty in the column 'text'"):
        list(encoded([{"text": "a"}, {"text": None}], "feature-extraction"))


def test_targets_at_padding_are_ignored() -> None:
    rows = [{"source": "a b", "target": "c d e"}, {"source": "a", "target": "f"}]
    (batch,) = encoded(rows, "sequence-to-sequence")
    assert batch["labels"].tolist() == [[1, 1, 1], [1, -100, -100]]
    (batch,) = encoded([{"text": "a b"}, {"text": "a"}], "language-model")
    assert batch["labels"].tolist() == [[1, 1], [1, -100]]


def test_pairs_and_columns_of_other_names() -> None:
    rows = [{"premise": "a", "hypothesis": "b c", "gold": 1}]
    names = {"text": "premise", "text_pair": "hypothesis", "label": "gold"}
    (batch,) = encoded(rows, "text-classification", **names)
    assert batch["input_ids"].shape == (1, 3) and batch["labels"].tolist() == [1]
    with pytest.raises(RequestError, match="row 1 has no column 'text'.*premise.*\n.*--text"):
        list(encoded(rows, "text-classification"))
    with pytest.raises(RequestError, match="no column 'hypotesis'.*\n.*--text-pair-column"):
        list(encoded(rows, "text-classification", text="premise", text_pair="hypotesis"))
    ragged = [{"text": "a"}, {"text": "a"}, {"other": "b"}]
    with pytest.raises(RequestError, match="row 3 has no column 'text'"):
        list(encoded(ragged, "language-model"))


def test_images_are_opened_and_faults_named(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")

    def processor(images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
        assert all(image.mode == "RGB" for image in images)
        return {"pixel_values": torch.zeros(len(images), 3, 4, 4)}

    def data(name: str) -> EncodedRows:
        rows = [{"image": tmp_path / name, "label": "good"}]
        return EncodedRows(rows, "image-classification", processor, Columns(), 2, 8, LABELS, "RGB")

    (batch,) = data("a.png")
    assert batch["pixel_values"].shape == (1, 3, 4, 4) and batch["labels"].tolist() == [1]
    with pytest.raises(StatisticsError, match=r"b\.png: not a readable image"):
        list(data("b.png"))


def test_ready_batches_of_a_function_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [{"x": torch.ones(1, 2)}]
    monkeypatch.setitem(sys.modules, "ready", SimpleNamespace(make=lambda: batches))
    loaded: Any = SimpleNamespace(processor=None, model=None, task="language-model", label_ids={})
    found = open_batches("ready:make", loaded, BatchOptions(trust_code=True))
    assert list(found) == batches
