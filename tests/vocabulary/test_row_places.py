"""Runs of rows that follow each other in the output and in a model."""

import numpy as np
import pytest

from eutectic.vocabulary.row_places import _runs


@pytest.mark.parametrize(
    ("rows", "runs"),
    [
        ([-1, 0, 1, 2], [(1, 0, 3)]),  # row 0 is one more than the mark of a lacking row
        ([3, -1, 0], [(0, 3, 1), (2, 0, 1)]),
        ([-1, -1, 0, -1, 1], [(2, 0, 1), (4, 1, 1)]),
        ([0, 1, 4, 5, -1], [(0, 0, 2), (2, 4, 2)]),
        ([], []),
    ],
)
def test_rows_that_are_lacking_belong_to_no_run(rows, runs):
    assert list(_runs(np.array(rows, dtype=np.int64))) == runs


def test_every_row_is_in_a_run_once():
    random = np.random.default_rng(0)
    for _ in range(200):
        rows = random.integers(-1, 6, size=random.integers(1, 12))
        found = np.full(len(rows), -1)
        for first, own, count in _runs(rows.astype(np.int64)):
            assert np.all(found[first : first + count] == -1)
            found[first : first + count] = np.arange(own, own + count)
        assert np.array_equal(found, rows)
