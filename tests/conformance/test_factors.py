"""Deltas as thin factors give what the expanded deltas give, for every method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eutectic.errors import MethodError, NumericalError
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.methods import merge_matrices
from eutectic.types import LayerStatistics

from .cases import METHODS, Case, make_case, orthogonal, relative_error

TAKERS = [name for name, method in METHODS.items() if method.factors]
BOUND = 1e-5


def factored(
    out: int, inner: int, ranks: list[int], seed: int, dtype: torch.dtype = torch.float32
) -> LowRankStack:
    """Return adapters of separate singular values, so that every answer is well determined."""
    left, right = [], []
    for t, rank in enumerate(ranks):
        sizes = 0.5 ** torch.arange(rank, dtype=torch.float64)
        left.append((orthogonal(out, seed + 2 * t)[:, :rank] * sizes).to(dtype))
        right.append(orthogonal(inner, seed + 2 * t + 1)[:rank].to(dtype))
    return LowRankStack(tuple(left), tuple(right))


def few_rows(name: str, stack: LowRankStack, seed: int = 0) -> tuple[LayerStatistics, ...] | None:
    """Return input Grams of two rows each, for a method that needs Grams."""
    method = METHODS[name]
    if "gram" not in method.needs(method.parse({})):
        return None
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        LayerStatistics(
            # In float64: sums of stored float32 Grams are solved with a ridge where singular.
            gram_factor=torch.randn(2, stack.shape[2], generator=generator).double(),
            # The matching methods stay thin with rows alone.
            gram_diagonal=torch.full((stack.shape[2],), 0.1 * t) if name == "iso_a" else None,
            count=5 + t,
        )
        for t in range(len(stack))
    )


@st.composite
def adapters(draw: st.DrawFn) -> tuple[LowRankStack, list[float] | None]:
    """Draw one to four adapters of unequal ranks, 0 among them, some of them the same one twice."""
    out, inner = draw(st.integers(24, 48)), draw(st.integers(24, 48))
    ranks = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    stack = factored(out, inner, ranks, draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        stack = LowRankStack(stack.left + stack.left[:1], stack.right + stack.right[:1])
    weights = draw(st.none() | st.just([0.5, 2.0, 1.25, 0.75, 1.0]))
    return stack, None if weights is None else weights[: len(stack)]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *((name, {}) for name in TAKERS),
        ("iso_c", {"rank_tolerance": 1e-3}),
        ("tsv_m", {"rank_fraction": 0.05}),
        ("tsv_m", {"rank_fraction": 0.5}),
        ("iso_cts", {"common_fraction": 0.4}),
        ("iso_a", {"ridge": 1e-3, "rank_tolerance": 1e-4}),
        ("esm", {"preset": "roberta"}),
        ("regmean", {"off_diagonal": 1.0}),
        ("mats", {"iterations": 5}),
        ("mats", {"operator": "task_gram", "iterations": 3, "init": "zero"}),
        ("mats", {"solver": "direct"}),
        ("esm", {"preset": "none", "rank_fraction": 0.1}),
    ],
)
@settings(deadline=None, max_examples=40)
@given(drawn=adapters(), precision=st.sampled_from(["fast", "exact"]))
def test_factors_give_what_the_expanded_deltas_give(name, parameters, drawn, precision):
    stack, weights = drawn
    # Directions that these cut off in float32 depend on the rounding of the expanded deltas.
    if name in ("iso_cts", "esm"):
        stack = LowRankStack(*(tuple(f.double() for f in s) for s in (stack.left, stack.right)))
    more = {"weights": weights, "precision": precision, **parameters}
    more["statistics"] = few_rows(name, stack)
    merged = merge_matrices(name, stack, **more)
    assert merged.dtype == stack.dtype and merged.shape == stack.shape[1:]
    assert relative_error(merged, merge_matrices(name, stack.dense(), **more)) < BOUND


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize("ranks", [(3,), (2, 0, 5), (7, 6, 8), (12, 12)])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_factors_of_any_inner_size(name, shape, ranks):
    """In float64, Σ r_t below and above min(out, in), and factors that are not thin at all."""
    case = make_case(name, shape, experts=len(ranks), ranks=ranks)
    assert relative_error(case.merged(), replace(case, factors=None).merged()) < 1e-9


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        *((name, {}) for name in METHODS if name not in TAKERS),
        ("iso_c", {"support": "full"}),
        ("iso_c", {"rank_tolerance": 0.0}),
        ("iso_cts", {"support": "full"}),
        ("linear", {"normalize": False}),
    ],
)
def test_otherwise_they_are_expanded_first(name, parameters):
    case = make_case(name, (6, 9), ranks=(2, 1), dtype=torch.float32)
    base = make_case("slerp", (6, 9), dtype=torch.float32).base
    more = {
        "weights": case.weights,
        "experts": case.names,
        "base": base,
        "statistics": case.statistics,
        **parameters,
    }
    assert case.factors is not None
    merged = merge_matrices(name, case.factors, **more)
    assert torch.equal(merged, merge_matrices(name, case.deltas, **more))


THIN = {"regmean": {"off_diagonal": 1.0}}  # where the defaults depend on the inputs' own axes


@pytest.mark.parametrize("name", TAKERS)
def test_the_stack_is_never_formed(name, monkeypatch):
    def refuse(self: LowRankStack) -> Tensor:
        raise AssertionError("expanded")

    monkeypatch.setattr(LowRankStack, "dense", refuse)
    stack = factored(24, 30, [2, 3, 1], 0)
    grams = few_rows(name, stack)
    more = THIN.get(name, {})
    merge_matrices(name, stack, weights=[0.5, 2.0, 1.0], statistics=grams, **more)


@pytest.mark.parametrize("name", TAKERS)
def test_factors_are_left_alone(name):
    stack = factored(24, 30, [2, 3], 0)
    held = [*stack.left, *stack.right]
    before = [x.clone() for x in held]
    grams = few_rows(name, stack)
    merge_matrices(name, stack, weights=[0.5, 2.0], statistics=grams).fill_(float("nan"))
    assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True))


def test_pairs_in_any_spelling():
    stack = factored(6, 8, [2, 1], 0)
    merged = merge_matrices("task_arithmetic", stack)
    pairs = list(zip(stack.left, stack.right, strict=True))
    assert torch.equal(merge_matrices("task_arithmetic", pairs), merged)
    assert torch.equal(merge_matrices("task_arithmetic", list(stack)), merged)
    mixed = [pairs[0], LowRank(*pairs[1]).dense()]
    assert relative_error(merge_matrices("task_arithmetic", mixed), merged) < 1e-6


def test_half_precision_is_computed_in_float32():
    stack = factored(6, 8, [2, 1], 0, torch.bfloat16)
    wide = LowRankStack(tuple(f.float() for f in stack.left), tuple(f.float() for f in stack.right))
    for name in ("iso_c", "ties"):
        assert torch.equal(merge_matrices(name, stack), merge_matrices(name, wide))


@pytest.mark.parametrize(
    ("deltas", "error", "words"),
    [
        ([(torch.ones(4, 2), torch.ones(3, 5))], MethodError, r"shapes \[\[4, 2\], \[3, 5\]\]"),
        ([(torch.ones(4, 2),)], MethodError, "pair of thin factors"),
        (
            [(torch.ones(4, 2), torch.ones(2, 5)), (torch.ones(4, 2), torch.ones(2, 6))],
            MethodError,
            "must all have one shape",
        ),
        ([(torch.ones(4, 2).int(), torch.ones(2, 5).int())], MethodError, "floating-point"),
        ([(torch.ones(4, 2), torch.ones(2, 5) / 0)], NumericalError, r"expert \[0\]"),
    ],
)
def test_refusals(deltas, error, words):
    with pytest.raises(error, match=words):
        merge_matrices("average", deltas)


def test_the_number_of_experts_is_checked():
    case: Case = make_case("slerp", (4, 5), ranks=(1,))
    assert case.factors is not None
    with pytest.raises(MethodError, match="exactly 2 experts, got 1"):
        merge_matrices("slerp", list(case.factors)[:1], base=case.base)
