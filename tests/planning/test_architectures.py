"""Treatments of what the architectures of transformers, timm and open_clip consist of.

Guards the default treatments against the modules that hold the tensors, which a checkpoint does not
tell. The table is made by the scripts beside it, on the meta device; here nothing is built.
"""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures" / "architectures"


@pytest.fixture(scope="module")
def table():
    """The script beside the table."""
    spec = importlib.util.spec_from_file_location("architectures_table", FIXTURES / "table.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def rows(table):
    return table.read_table()


def test_every_tensor_is_treated_as_the_table_says(rows):
    differ = [
        f"{row.name} of {row.example}: {row.treatment} ({row.reason}), now {now}"
        for row in rows
        if (now := row.decision).treatment.value != row.treatment
        or now.reason[0].kind != row.reason
    ]
    assert not differ, "\n".join(differ)


def test_linear_layers_tables_and_kernels_are_treated_as_such(rows):
    assert [row.name for row in rows if row.wrong] == []
    kinds = Counter(row.kind for row in rows)
    assert kinds["linear"] > 500
    assert min(kinds["conv"], kinds["table"]) > 100


def test_what_is_a_linear_layer_and_no_matrix_is_so_on_purpose(rows):
    aside = [row for row in rows if row.kind == "linear" and row.treatment != "matrix"]
    assert aside
    for row in aside:
        projection = row.name.split(".")[-2] == "text_projection"
        assert min(row.shape) <= 1 or projection, row


def test_every_exception_is_one(table, rows):
    for name in table.UNTOLD:
        assert any(row.name.endswith(name) and row.treatment != "embedding" for row in rows), name


def test_weights_that_are_kept_with_inputs_first_are_turned(rows):
    for row in rows:
        if row.kind in ("linear", "conv1d") and row.treatment == "matrix":
            assert row.decision.layout.transpose == (row.kind == "conv1d"), row
