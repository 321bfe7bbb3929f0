"""Grid and golden section on functions whose optimum is known."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eutectic.errors import Note, NumericalError, RequestError
from eutectic.tuning import Measured, search_scale
from eutectic.tuning.search import grid


@settings(max_examples=60, deadline=None)
@given(
    optimum=st.floats(0.02, 3.0),
    tolerance=st.floats(0.005, 0.3),
    points=st.integers(3, 30),
)
def test_a_single_optimum_is_found_within_the_tolerance(optimum, tolerance, points):
    tried = []

    def cost(scale):
        tried.append(scale)
        return (math.log(scale / optimum)) ** 2

    curve = search_scale(cost, tolerance=tolerance, points=points)
    assert abs(math.log(curve.scale / optimum)) <= math.log1p(tolerance) + 1e-5
    assert len(tried) == len(set(tried)) == len(curve.points)
    assert list(curve.points) == sorted(tried)
    assert min(tried) >= 0.02 and max(tried) <= 3.0


def test_the_defaults_take_seventeen_values_and_announce_them():
    told = []
    curve = search_scale(lambda a: abs(a - 0.5), tell=lambda *words: told.append(words))
    assert len(curve.points) == 17
    assert [done for done, _, _ in told] == list(range(17))
    assert {total for _, total, _ in told} == {17}


def test_maximise_is_the_mirror_image():
    def bump(a):
        return math.exp(-((a - 0.9) ** 2))

    top = search_scale(bump, maximise=True)
    assert top.points == {a: Measured(bump(a)) for a in top.points}
    assert top.scale == search_scale(lambda a: -bump(a)).scale
    assert top.value == max(m.value for m in top.points.values())


@pytest.mark.parametrize(("low", "high"), [(0.05, 2.5), (0.1, 2), (0.1, 1), (0.3, 0.5), (1, 9)])
def test_the_middle_of_a_plateau(low, high):
    curve = search_scale(lambda a: float(low <= a <= high), maximise=True)
    tied = [a for a, m in curve.points.items() if m.value == 1.0]
    assert tied[0] < curve.scale < tied[-1]
    # Neighbours on the grid are at a ratio of 1.65; nothing says where between them an end lies.
    assert 1.65**-0.5 < curve.scale / math.sqrt(low * min(high, 3.0)) < 1.65**0.5


def test_of_several_plateaus_the_widest():
    curve = search_scale(lambda a: float(0.03 < a < 0.06 or 0.3 < a < 2), maximise=True)
    assert 0.6 < curve.scale < 1


@pytest.mark.parametrize(("cost", "edge"), [(lambda a: a, 0.02), (lambda a: -a, 3.0)])
def test_an_optimum_at_the_edge_is_told(cost, edge):
    curve = search_scale(cost)
    assert curve.at_edge and curve.scale == edge
    assert not search_scale(lambda a: abs(a - 1)).at_edge


def test_a_plateau_that_begins_at_the_smallest_scale_is_flat():
    """Few values of a metric that moves in steps miss the α at which it rises."""
    steps = search_scale(lambda a: 0.9 if 1.4 < a < 1.6 else 0.4, points=3, maximise=True)
    assert steps.value == 0.4 and steps.flat and not steps.at_edge
    assert not search_scale(lambda a: abs(a - 1)).flat
    assert not search_scale(lambda a: a).flat  # at the edge, which is told
    numbers = {
        "scale": 0.1, "search": "validation", "split": "validation", "points": 3, "best": 0.4,
        "edge": False, "shared": [], "ignored": [],
    }  # fmt: skip
    words = "the smallest that was tried did as well"
    assert words in Note("searched_scale", ("a",), {**numbers, "flat": True}).text
    assert words not in Note("searched_scale", ("a",), numbers).text


def test_parts_and_nan_are_kept():
    def objective(scale):
        value = math.nan if scale > 1 else (scale - 0.5) ** 2
        return Measured(value, {"task": value})

    curve = search_scale(objective)
    assert abs(curve.scale - 0.5) < 0.03
    record = json.loads(json.dumps(curve.as_record(), allow_nan=False))
    assert record["points"][-1] == {"scale": 3.0, "value": None, "parts": {"task": None}}
    assert record["scale"] == curve.scale


def test_no_value_at_all():
    with pytest.raises(NumericalError, match=r"no finite value for any α from 0\.02 to 3"):
        search_scale(lambda a: math.nan)


@pytest.mark.parametrize(
    "bad", [{"low": 0}, {"low": 2, "high": 1}, {"points": 2}, {"tolerance": 0}, {"high": math.inf}]
)
def test_refusals(bad):
    with pytest.raises(RequestError, match="0 < low < high"):
        search_scale(lambda a: a, **bad)


def test_a_fine_grid_needs_no_sections():
    curve = search_scale(lambda a: abs(a - 1), points=200, tolerance=0.1)
    assert list(curve.points) == grid(0.02, 3.0, 200)
