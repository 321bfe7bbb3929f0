"""Guards settings: gradients over depth, and cases by name."""

from __future__ import annotations

import pytest

from eutectic.recipes.settings import Case, Gradient, first_value, scalars, value_of


@pytest.mark.parametrize(
    ("depth", "value"), [(0.0, 1.0), (0.25, 0.5), (0.5, 0.0), (0.75, 2.0), (1.0, 4.0)]
)
def test_a_gradient_is_interpolated(depth, value):
    assert Gradient((1.0, 0.0, 4.0)).at(depth) == pytest.approx(value)


def test_a_gradient_of_one_value_is_that_value():
    assert Gradient((0.3,)).at(0.7) == 0.3


def test_truth_values_and_words_are_steps():
    assert [Gradient((True, False)).at(d) for d in (0, 0.99, 1)] == [True, True, False]
    assert [Gradient(("a", "b", "c")).at(d) for d in (0, 0.5, 1)] == ["a", "b", "c"]


def test_the_first_case_that_fits_decides():
    setting = (Case("*mlp*", Gradient((0, 1))), Case("*attn*", 5), Case(None, 7))
    assert value_of(setting, "layers.0.mlp.up", 0.25) == 0.25
    assert value_of(setting, "layers.0.attn.q", 0.25) == 5
    assert value_of(setting, "norm", 0.25) == 7
    assert value_of(setting[:2], "norm", 0.25) is None


def test_a_place_without_a_fitting_case_leaves_the_next_to_say_it():
    places = [{}, {"weight": (Case("*mlp*", 1),)}, {"weight": 2}]
    assert first_value(places, "weight", "a.mlp.b", 0) == 1
    assert first_value(places, "weight", "a.norm", 0) == 2
    assert first_value(places, "density", "a.norm", 0) is None


def test_all_scalars_of_a_setting():
    setting = (Case("*a*", Gradient((1, 2))), Case(None, 3))
    assert list(scalars(setting)) == [1, 2, 3]


def test_one_of_several_spellings_has_to_fit():
    setting = (Case("*mlp*", 1), Case("*sparse*", 2), Case(None, 3))
    assert value_of(setting, ("a.sparse.b", "a.mlp.b"), 0) == 1
    assert value_of(setting, ("a.sparse.b",), 0) == 2
