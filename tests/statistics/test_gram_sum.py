"""Guards sums of outer products: independence of batching, both forms, truncation, going on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import assert_near
from torch import Tensor

from eutectic.errors import NumericalError
from eutectic.statistics.gram import GramSum, check_finite, truncate_gram


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def summed(pieces: list[Tensor], width: int) -> GramSum:
    gram = GramSum(width)
    for piece in pieces:
        gram.add(piece.clone())
    return gram


def dense(stored: dict[str, Tensor]) -> Tensor:
    if "gram" in stored:
        return stored["gram"]
    return stored["factor"].T @ stored["factor"] + torch.diag(
        stored.get("diagonal", torch.zeros(stored["factor"].shape[1]).double())
    )


@settings(deadline=None, max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 1400), max_size=6),
    count=st.integers(1, 1400),
    width=st.integers(1, 40),
)
def test_the_sum_does_not_depend_on_how_rows_are_cut(
    cuts: list[int], count: int, width: int
) -> None:
    x = rows(count, width)
    edges = [0, *sorted(min(c, count) for c in cuts), count]
    pieces = [x[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    whole, parts = summed([x], width), summed(pieces, width)
    assert whole.count == parts.count == count
    left, right = whole.tensors(), parts.tensors()
    assert left.keys() == right.keys() == ({"factor"} if count < width else {"gram"})
    assert all(torch.equal(left[k], right[k]) for k in left)
    exact = x.double().T @ x.double()
    assert_near(dense(left), exact)


def test_few_rows_become_a_factor_that_shows_no_row() -> None:
    x = rows(5, 12)
    factor = summed([x], 12).tensors()["factor"]
    assert factor.shape == (5, 12)
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() >= 0).all()
    # Any order of the rows gives the same factor.
    assert_near(summed([x.flip(0)], 12).tensors()["factor"], factor)


def test_going_on_from_a_state_is_exact() -> None:
    x = rows(1500, 8)
    for cut in (3, 600, 1100):
        first = summed([x[:cut]], 8)
        second = GramSum(8)
        second.load({k: v.clone() for k, v in first.state().items()})
        second.add(x[cut:].clone())
        assert torch.equal(second.dense(), summed([x], 8).dense())


def test_no_rows_give_nothing() -> None:
    assert GramSum(3).tensors() == {}
    assert summed([torch.zeros(0, 3)], 3).tensors() == {}


@pytest.mark.parametrize("count", [4, 9, 25, 2000])
def test_truncation_keeps_the_diagonal_and_never_exceeds_the_gram(count: int) -> None:
    x = rows(count, 40) * torch.logspace(0, -3, 40)
    exact = x.double().T @ x.double()
    stored = summed([x], 40).tensors(rank=10, seed="layer")
    if count <= 10:
        assert stored.keys() == {"factor"}
        assert_near(dense(stored), exact)
        return
    factor, diagonal = stored["factor"], stored["diagonal"]
    assert factor.shape == (10, 40)
    assert (diagonal >= 0).all()
    assert_near(dense(stored).diagonal(), exact.diagonal())
    rest = exact - factor.T @ factor
    assert torch.linalg.eigvalsh(rest).min() > -1e-6 * exact.diagonal().sum()
    best = torch.linalg.svdvals(exact)[10:].norm()
    assert rest.norm() <= 1.1 * best + 1e-6 * exact.norm()


def test_truncation_is_deterministic_and_survives_low_rank() -> None:
    x = rows(3, 20).double()
    gram = x.T @ x
    first, second = (truncate_gram(gram, 8, "name") for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert_near(dense(first), gram)
    zero = truncate_gram(torch.zeros(20, 20).double(), 8, "name")
    assert torch.equal(dense(zero), torch.zeros(20, 20).double())


def test_float64_rows_are_multiplied_in_float64() -> None:
    x = rows(700, 6).double()
    assert_near(summed([x], 6).dense(), x.T @ x, 1e-14)


def test_not_a_number_is_named() -> None:
    x = rows(4, 3)
    x[1, 2] = float("inf")
    with pytest.raises(NumericalError, match=r"inputs of 'q', batch 7: 1 of 4"):
        check_finite(x, "q", 7, "inputs")
