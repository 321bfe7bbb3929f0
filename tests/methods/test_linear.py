"""Guards the weighted means: the formula, the weights, and the sums that cannot be divided."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eutectic.errors import MethodError
from eutectic.methods import merge_matrices
from eutectic.methods.linear import finite

DELTAS = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("method", ["average", "linear"])
@settings(deadline=None, max_examples=25)
@given(weights=st.lists(st.floats(0.01, 10), min_size=3, max_size=3))
def test_weighted_mean(method, weights):
    w = torch.tensor(weights, dtype=torch.float64)
    expected = torch.einsum("t,toi->oi", w, DELTAS) / w.sum()
    assert torch.allclose(merge_matrices(method, DELTAS, weights=weights), expected, rtol=1e-12)


@pytest.mark.parametrize("method", ["average", "linear"])
def test_weights_count_relative_to_each_other(method):
    once = merge_matrices(method, DELTAS, weights=(1, 2, 3))
    tenfold = merge_matrices(method, DELTAS, weights=(10, 20, 30))
    assert torch.allclose(once, tenfold, rtol=1e-12)


@pytest.mark.parametrize("method", ["average", "linear"])
def test_weights_that_cancel_have_no_mean(method):
    with pytest.raises(MethodError, match=r"sum to zero.*\(1\.0, -1\.0, 0\.0\)"):
        merge_matrices(method, DELTAS, weights=(1, -1, 0))


def test_negative_weights_are_taken_as_they_are():
    merged = merge_matrices("average", DELTAS, weights=(2, -1, 0))
    assert torch.allclose(merged, 2 * DELTAS[0] - DELTAS[1])


def test_the_mean_of_float32_is_exact_where_it_can_be():
    stack = torch.tensor([[[1.0, 3.0]], [[2.0, 5.0]]])
    assert merge_matrices("average", stack).tolist() == [[1.5, 4.0]]


def test_linear_without_normalising_is_a_sum_of_weights():
    base = torch.full((4, 5), 2.0, dtype=torch.float64)
    merged = merge_matrices("linear", DELTAS, base=base, weights=(1, 1, 1), normalize=False)
    assert torch.allclose(base + merged, (DELTAS + base).sum(0))


def test_linear_without_normalising_needs_the_base():
    with pytest.raises(MethodError, match="works on weights and needs base"):
        merge_matrices("linear", DELTAS, normalize=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_finite_finds_what_is_not(value):
    x = torch.zeros(100)
    assert finite(x)
    x[37] = value
    assert not finite(x)


def test_finite_is_not_misled_by_a_sum_that_overflows():
    assert finite(torch.full((4,), 3e38))
    assert finite(torch.empty(0, 3))
