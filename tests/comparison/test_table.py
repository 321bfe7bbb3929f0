"""Ranks: by shares of the experts, else by the mean, lower or higher; what is level with it."""

from __future__ import annotations

from typing import Any

import pytest

from eutectic.cli.compare import _signed
from eutectic.comparison.candidates import candidates_of, ways_of
from eutectic.comparison.table import Made, file_name, ranked
from eutectic.evaluation.results import Difference, Mean, Results, TaskRecord

EMPTY: dict[str, Any] = {"interval": None, "standard_error": None, "normalized_interval": None}
EMPTY |= {"nai": None, "nai_interval": None}


def results(
    values: dict[str, tuple[float, float | None]],
    intervals: dict[tuple[str, str], tuple[float, float]],
    higher: bool = True,
) -> Results:
    task = TaskRecord(
        name="t", kind="k", expert="t", metric="m", higher_is_better=higher, split="test", n=1,
        data_hash="", splits={}, head_hashes={},
    )  # fmt: skip
    return Results(
        split="test", limit=None, dtype="float32", seed=0, resamples=1, versions={},
        checkpoints=(), tasks=(task,), results=(),
        means=tuple(
            Mean(checkpoint=n, tasks=("t",), value=v, normalized=s, **EMPTY)
            for n, (v, s) in values.items()
        ),
        differences=tuple(
            Difference(
                checkpoint=a, other=b, value=0.0, interval=i, normalized=0.0, normalized_interval=i
            )
            for (a, b), i in intervals.items()
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "higher", "order"),
    [
        ({"a": (1.0, 0.9), "b": (2.0, 0.8), "c": (0.0, 0.95)}, True, ["c", "a", "b"]),
        ({"a": (1.0, 0.9), "b": (2.0, None), "c": (0.5, 0.95)}, True, ["b", "a", "c"]),
        ({"a": (1.0, None), "b": (2.0, None), "c": (0.5, None)}, False, ["c", "a", "b"]),
        ({"a": (1.0, 0.9), "b": (1.0, 0.9), "c": (1.0, 0.9)}, True, ["a", "b", "c"]),
    ],
)
def test_order(values, higher, order):
    rows, best = ranked(results(values, {}, higher), [Made(n) for n in values])
    assert [row.name for row in rows] == order and best == order[0]


def test_what_is_level_and_what_failed():
    values = {"a": (1.0, 0.9), "b": (1.0, 0.8), "c": (1.0, 0.7)}
    intervals = {("b", "a"): (-0.2, 0.01), ("c", "a"): (-0.3, -0.1)}
    made = [Made("broken", error="NaN"), *(Made(n) for n in values)]
    rows, best = ranked(results(values, intervals), made)
    assert best == "a" and [row.name for row in rows] == ["a", "b", "c", "broken"]
    assert [row.distinguishable for row in rows] == [False, False, True, True]
    assert rows[1].behind.interval == (-0.2, 0.01) and rows[-1].error == "NaN"


def test_all_failed():
    rows, best = ranked(results({}, {}), [Made("a", error="NaN")])
    assert best == "" and rows[0].error == "NaN"


def test_names_of_methods():
    found = candidates_of(["ties:density=0.3,aggregate=sum", "a:x=[1, 2],y=null"], {}, False)
    assert found[0].method == "ties" and found[0].parameters == {"density": 0.3, "aggregate": "sum"}
    assert found[1].parameters == {"x": [1, 2], "y": None}
    own = {"method": "ties", "parameters": {"density": 0.5, "scope": "model"}}
    (merged,) = candidates_of(["ties:density=0.3"], own, False)
    assert merged.parameters == {"density": 0.3, "scope": "model"}
    names = [c.name for c in candidates_of(None, own, True)]
    assert names[0] == "ties" and names[-4:] == ["regmean", "esm", "iso_a", "iso_regmean"]
    (named,) = candidates_of([{"method": "ties", "parameters": {"density": 0.1}}], {}, False)
    assert named.name == "ties:density=0.1"


@pytest.mark.parametrize(
    ("splits", "tasks", "statistics", "expected"),
    [
        ([{"validation", "proxy"}, {"validation"}], "t.yaml", True, "validation"),
        ([{"validation", "proxy"}, {"proxy"}], "t.yaml", True, "divergence"),
        ([{"test"}], "t.yaml", True, "auto"),
        ([{"test"}], "t.yaml", False, "norm"),
        ([{"validation"}], None, False, "norm"),
    ],
)
def test_the_best_search_that_the_data_allow(splits, tasks, statistics, expected):
    names = [way.name for way in ways_of(None, {}, tasks, splits, statistics)]
    assert names == ["default", *([expected] if expected else [])]


def test_ways():
    found = ways_of([0.5, "0.25", "gram"], {"points": 3}, None, [], True)
    assert [way.name for way in found] == ["0.5", "0.25", "auto"]
    assert found[2].search is not None and found[2].search.search == "gram"


def test_files_of_rows():
    assert file_name("ties:density=0.3@default") == "ties_density=0.3@default"
    long = {file_name("x" * 300 + str(i)) for i in range(3)}
    assert len(long) == 3 and all(len(name) < 130 for name in long)


@pytest.mark.parametrize(
    ("value", "shown"), [(-0.04, "0.0"), (0.04, "0.0"), (-0.06, "-0.1"), (3.21, "+3.2"), (0, "0.0")]
)
def test_a_difference_that_is_shown_as_zero_has_no_sign(value: float, shown: str) -> None:
    assert _signed(value, 1) == shown
