"""One set of rules for columns, whoever reads the rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from eutectic.data.columns import Columns, check_columns, check_pairs, required_inputs
from eutectic.errors import RequestError


def task(kind: str, **columns: str) -> Any:
    return SimpleNamespace(kind=kind, columns=Columns(**columns))


@pytest.mark.parametrize(
    ("kind", "columns", "required"),
    [
        ("text-classification", {}, ["text"]),
        ("text-classification", {"text_pair": "second"}, ["text", "text_pair"]),
        ("pair-classification", {}, ["text", "text_pair"]),
        ("regression", {}, ["text"]),
        ("image-classification", {}, ["image"]),
        ("sequence-to-sequence", {}, ["source"]),
        ("language-model", {}, ["text"]),
        ("function", {}, []),
    ],
)
def test_a_second_text_is_required_only_where_it_is_named(
    kind: str, columns: dict[str, str], required: list[str]
):
    assert required_inputs(task(kind, **columns)) == required


def test_faults_name_the_row_the_column_and_the_way_out():
    rows = [{"text": "a", "x": 1}, {"text": None}, {"y": 2}]

    def check(first: int, wanted: list[str]) -> None:
        columns = Columns(label="x")
        advice = "Name {}.".format
        check_columns(rows[first:], columns, wanted, advice=advice, where="d: ", first=first + 7)

    with pytest.raises(RequestError, match="d: row 8 is empty in the column 'text'"):
        check(0, ["text"])
    with pytest.raises(RequestError, match=r"row 9 has no column 'text'; it has y\.\nName text\."):
        check(2, ["text"])
    with pytest.raises(RequestError, match=r"row 8 has no column 'x'.*\nName label\."):
        check(0, ["label"])


def test_half_a_file_of_pairs_is_refused_where_pairs_are_read():
    rows = [{"text": "a", "text_pair": "b"}, {"text": "a", "text_pair": None}]
    for kind in ("text-classification", "regression", "feature-extraction"):
        with pytest.raises(RequestError, match="row 2 has no 'text_pair', row 1 has"):
            check_pairs(rows, task(kind))
    check_pairs(rows, task("language-model"))
    check_pairs(rows[:1], task("text-classification"))
