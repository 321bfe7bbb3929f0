"""Identities between methods: special cases in which two of them are one and the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eutectic.methods import merge_matrices
from eutectic.types import LayerStatistics

from .cases import make_case, relative_error

SHAPES = [(6, 9), (9, 6), (8, 8), (1, 5), (5, 1)]


def deltas(shape=(6, 9), experts=3, rank=None, seed=0, dtype=torch.float64) -> Tensor:
    return make_case("average", shape, experts=experts, rank=rank, seed=seed, dtype=dtype).deltas


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("support", "rank"), [("numerical", None), ("numerical", 1), ("full", None)]
)
def test_iso_cts_with_everything_common_is_iso_c(shape, rank, support):
    stack = deltas(shape, rank=rank)
    all_common = merge_matrices("iso_cts", stack, common_fraction=1.0, support=support)
    assert relative_error(all_common, merge_matrices("iso_c", stack, support=support)) < 1e-9


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_iso_c_has_a_flat_spectrum_of_the_same_trace_norm(rows, columns, seed):
    stack = deltas((rows, columns), seed=seed)
    before = torch.linalg.svdvals(stack.sum(0))
    after = torch.linalg.svdvals(merge_matrices("iso_c", stack))
    assert torch.allclose(after, before.mean().expand_as(after), rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tsv_m_of_one_expert_is_the_expert(shape, dtype):
    stack = deltas(shape, experts=1, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert relative_error(merge_matrices("tsv_m", stack), stack[0]) < tolerance


def test_linear_of_equal_weights_is_the_average():
    stack = deltas()
    assert torch.equal(merge_matrices("linear", stack), merge_matrices("average", stack))


def test_linear_without_normalising_leaves_the_base_out():
    stack, base, w = deltas(), deltas(seed=1)[0], (0.2, 0.3, 0.9)
    merged = merge_matrices("linear", stack, base=base, weights=w, normalize=False)
    expected = sum(v * (base + d) for v, d in zip(w, stack, strict=True)) - base
    assert relative_error(merged, expected) < 1e-12


def test_average_is_task_arithmetic_over_the_number_of_experts():
    stack = deltas(experts=4)
    sum_over_4 = merge_matrices("task_arithmetic", stack) / 4
    assert relative_error(merge_matrices("average", stack), sum_over_4) < 1e-12


def test_dare_that_drops_nothing_is_task_arithmetic():
    stack, w = deltas(), (0.5, 1.0, 2.0)
    kept = merge_matrices("dare_linear", stack, density=1.0, weights=w)
    assert torch.equal(kept, merge_matrices("task_arithmetic", stack, weights=w))


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
def test_dare_ties_that_drops_nothing_is_ties_that_trims_nothing(aggregate):
    stack, w = deltas(), (0.5, 1.0, 2.0)
    more = {"density": 1.0, "aggregate": aggregate, "weights": w}
    assert torch.equal(
        merge_matrices("dare_ties", stack, **more), merge_matrices("ties", stack, **more)
    )


def test_ties_of_one_expert_that_trims_nothing_is_the_expert():
    stack = deltas(experts=1)
    assert torch.equal(merge_matrices("ties", stack, density=1.0), stack[0])


def test_ties_of_experts_that_agree_is_their_average_or_sum():
    stack = deltas().abs()
    mean = merge_matrices("ties", stack, density=1.0)
    total = merge_matrices("ties", stack, density=1.0, aggregate="sum")
    assert relative_error(mean, merge_matrices("average", stack)) < 1e-12
    assert relative_error(total, merge_matrices("task_arithmetic", stack)) < 1e-12


def test_slerp_of_orthogonal_tensors_of_one_length_is_on_the_circle():
    first, second = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    stack, base = torch.stack([first, second]).double(), torch.zeros(1, 2, dtype=torch.float64)
    merged = merge_matrices("slerp", stack, base=base)
    assert torch.allclose(merged, torch.full((1, 2), 3.0 / 2**0.5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_regmean_with_white_inputs_is_the_average(shape):
    stack = deltas(shape)
    white = LayerStatistics(gram=torch.eye(shape[1], dtype=torch.float64) * 7, count=7)
    merged = merge_matrices("regmean", stack, statistics=[white] * 3)
    assert relative_error(merged, merge_matrices("average", stack)) < 1e-9


def test_conjugate_gradients_run_to_convergence_are_the_closed_form():
    case = make_case("regmean", (6, 9))
    more = {"statistics": case.statistics, "weights": (1.0, 0.5, 2.0)}
    solved = merge_matrices(
        "mats", case.deltas, operator="gram", iterations=200, tolerance=1e-12, **more
    )
    closed = merge_matrices("regmean", case.deltas, off_diagonal=1.0, **more)
    assert relative_error(solved, closed) < 1e-8


def test_esm_has_a_flat_spectrum():
    case = make_case("esm", (8, 12))
    merged = merge_matrices("esm", case.deltas, statistics=case.statistics)
    values = torch.linalg.svdvals(merged)
    kept = values[values > 1e-9 * values[0]]
    assert torch.allclose(kept, kept[0].expand_as(kept), rtol=1e-6)
