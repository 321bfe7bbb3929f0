"""Iso-A from few directions of the input metrics."""

import pytest
import torch
from torch import Tensor

from eutectic import merge_matrices
from eutectic.errors import MethodError
from eutectic.types import LayerStatistics

OUT, IN, EXPERTS, RIDGE = 24, 80, 3, 0.1


def grams(power: float = 1.0, dtype: torch.dtype = torch.float64) -> list[LayerStatistics]:
    generator = torch.Generator().manual_seed(7)
    found: list[LayerStatistics] = []
    for _ in range(EXPERTS):
        turned = torch.linalg.qr(torch.randn(IN, IN, generator=generator, dtype=dtype)).Q
        X = torch.randn(300, IN, generator=generator, dtype=dtype)
        X = (X * torch.arange(1, IN + 1) ** -power) @ turned
        found.append(LayerStatistics(gram=X.mT @ X, count=300))
    return found


def deltas(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(EXPERTS, OUT, IN, generator=generator, dtype=dtype)


@pytest.fixture(autouse=True)
def widths_are_wide(monkeypatch: pytest.MonkeyPatch):
    """So that matrices of a test's size go the way of a language model's."""
    monkeypatch.setattr("eutectic.linalg.metric.WHOLE_WIDTH", 16)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polynomials_near_the_eigenproblems(dtype: torch.dtype):
    stored = [LayerStatistics(gram=e.gram.to(dtype), count=e.count) for e in grams()]
    stack = deltas(dtype)
    whole = merge_matrices("iso_a", stack, statistics=stored, metric_rank="full")
    small = merge_matrices("iso_a", stack, statistics=stored, metric_rank=IN // 4 + 1)
    assert apart(small, whole) < (1e-4 if dtype == torch.float32 else 1e-12)
    errors = [
        apart(
            merge_matrices("iso_a", stack, statistics=stored, metric_rank=8, metric_degree=n),
            whole,
        )
        for n in (0, 2, 4, 8, 16)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 and errors[2] < 0.05 and errors[-1] < 5e-4


def test_exact_precision_takes_eigenproblems():
    own = {"statistics": grams(), "precision": "exact"}
    whole = merge_matrices("iso_a", deltas(), metric_rank="full", **own)
    assert torch.equal(whole, merge_matrices("iso_a", deltas(), **own))


def test_even_inputs_give_iso_c():
    even = [LayerStatistics(gram=float(n) * torch.eye(IN), count=n) for n in (10, 10, 10)]
    ours = merge_matrices(
        "iso_a", deltas(torch.float32), statistics=even, metric_rank=5, metric_degree=4
    )
    assert apart(ours, merge_matrices("iso_c", deltas(torch.float32))) < 1e-5


def test_turned_inputs_turn_the_result():
    generator = torch.Generator().manual_seed(5)
    P, Q = (torch.linalg.qr(torch.randn(n, n, generator=generator).double()).Q for n in (OUT, IN))
    stack, entries = deltas(), grams()
    turned = [LayerStatistics(gram=Q.mT @ e.gram @ Q, count=e.count) for e in entries]
    ours = merge_matrices("iso_a", P @ stack @ Q, statistics=turned, metric_rank=6)
    assert (
        apart(ours, P @ merge_matrices("iso_a", stack, statistics=entries, metric_rank=6) @ Q)
        < 1e-2
    )


def test_a_stored_factor_with_an_uneven_rest_is_cut_as_its_gram():
    generator = torch.Generator().manual_seed(2)
    factored: list[LayerStatistics] = []
    dense: list[LayerStatistics] = []
    for _ in range(EXPERTS):
        rows = torch.randn(30, IN, generator=generator).double() * 0.8 ** torch.arange(30)[:, None]
        rest = torch.rand(IN, generator=generator).double() * 0.01
        factored.append(LayerStatistics(gram_factor=rows, gram_diagonal=rest, count=50))
        dense.append(LayerStatistics(gram=rows.mT @ rows + torch.diag(rest), count=50))
    one, other = (
        merge_matrices("iso_a", deltas(), statistics=s, metric_rank=6) for s in (factored, dense)
    )
    assert apart(one, other) < 1e-9


def test_an_expert_without_inputs_enters_evenly():
    entries = grams()
    entries[1] = LayerStatistics(gram=torch.zeros(IN, IN).double(), count=4)
    ours = merge_matrices("iso_a", deltas(), statistics=entries, metric_rank=6)
    assert bool(ours.isfinite().all()) and bool(ours.any())


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_the_size_of_inputs_does_not_matter(scale: float):
    entries = grams(dtype=torch.float32)
    sized = [LayerStatistics(gram=e.gram * scale, count=e.count) for e in entries]
    one, other = (
        merge_matrices("iso_a", deltas(torch.float32), statistics=s, metric_rank=6)
        for s in (entries, sized)
    )
    assert apart(one, other) < 1e-4


@pytest.mark.parametrize("bad", [0, -3, "all"])
def test_a_rank_is_a_number_or_full(bad: object):
    with pytest.raises(MethodError, match="metric_rank"):
        merge_matrices("iso_a", deltas(), statistics=grams(), metric_rank=bad)


def test_narrow_grams_are_multiplied_in_float32():
    # With enough on the diagonal, so that rounding leaves no negative eigenvalue.
    firm = [e.gram + 0.05 * e.gram.trace() * torch.eye(IN) for e in grams()]
    narrow = [LayerStatistics(gram=gram.bfloat16(), count=300) for gram in firm]
    widened = [LayerStatistics(gram=e.gram.float(), count=e.count) for e in narrow]
    one, other = (
        merge_matrices("iso_a", deltas(torch.float32), statistics=s, metric_rank=6)
        for s in (narrow, widened)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["iso_a", "iso_regmean"])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("size", [1e-32, 1e32])
def test_wide_grams_of_any_size_give_the_same_merge(method, rows, size):
    """A factor on all Grams cancels, up to the ends of float32's range."""
    g = torch.Generator().manual_seed(2)
    width = 80
    stack = 0.02 * torch.randn(2, 12, width, generator=g)
    inputs = torch.randn(2, 120, width, generator=g).double() * torch.logspace(0, -2, width)

    def merged(factor: float) -> torch.Tensor:
        entries = []
        for x in inputs:
            if rows:
                gram = {
                    "gram": None,
                    "gram_factor": (x[:40] * factor**0.5).float(),
                    "gram_diagonal": (x[40:].square().sum(0) * factor).float(),
                }
            else:
                gram = {"gram": (x.T @ x * factor).float()}
            entries.append(LayerStatistics(**gram, count=len(x)))
        return merge_matrices(method, stack, statistics=entries, metric_rank=8)

    assert apart(merged(size), merged(1.0)) < 1e-5
