"""One set of rules for labels: names first, numbers where no name says otherwise."""

from __future__ import annotations

import math
from typing import Any

import pytest

from eutectic.data.columns import ClassLabels, class_index, finite_number
from eutectic.errors import StatisticsError

PLAIN = {"no": 0, "yes": 1}
STARS = {"1": 0, "2": 1, "3": 2}


@pytest.mark.parametrize(
    ("value", "names", "index"),
    [
        ("yes", PLAIN, 1),
        (1, PLAIN, 1),
        ("1", PLAIN, 1),
        (1.0, PLAIN, 1),
        ("1.0", PLAIN, 1),
        (3, STARS, 2),
        (3.0, STARS, 2),
        (True, {"LABEL_0": 0, "LABEL_1": 1}, 1),
        (True, {"true": 0, "false": 1}, 0),
        (7, {}, 7),
    ],
)
def test_classes_by_name_or_number(value: Any, names: dict[str, int], index: int):
    assert class_index(value, names) == index


@pytest.mark.parametrize(
    ("value", "names", "classes"),
    [
        ("maybe", PLAIN, 2),
        (2, PLAIN, 2),
        (-1, PLAIN, math.inf),
        (0.5, PLAIN, math.inf),
        (math.nan, PLAIN, math.inf),
        (0, STARS, 3),
        (True, PLAIN, 2),
        (None, PLAIN, 2),
        ([1], PLAIN, 2),
    ],
)
def test_what_is_no_class(value: Any, names: dict[str, int], classes: float):
    with pytest.raises((ValueError, TypeError)):
        class_index(value, names, classes)


def test_labels_that_are_numbers_or_sets():
    labels = ClassLabels(PLAIN)
    assert [labels.of_row(v, 1) for v in ("yes", 3, "4", 0.5, [1.0, 0.0])] == [
        1, 3, 4, 0.5, [1.0, 0.0],
    ]  # fmt: skip
    with pytest.raises(StatisticsError, match="row 5: the model knows no label 'maybe'"):
        labels.of_row("maybe", 5)
    with pytest.raises(StatisticsError, match="row 5: the model knows no label '2'.*\n.*or 0 to 1"):
        ClassLabels(PLAIN, 2).of_row(2, 5)


@pytest.mark.parametrize("value", [math.inf, "x", None])
def test_numbers_are_finite(value: Any):
    assert finite_number("0.25") == 0.25
    with pytest.raises((ValueError, TypeError)):
        finite_number(value)
