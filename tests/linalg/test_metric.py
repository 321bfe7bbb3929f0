"""Metrics of few directions against the eigendecomposition of the whole."""

import pytest
import torch
from torch import Tensor

from eutectic.linalg.core import core_space, core_space_beside
from eutectic.linalg.lowrank import LowRankStack
from eutectic.linalg.metric import InputMetric, leading_pairs, mean_metric, truncates

IN, RANK = 96, 8


def second_moment(seed: int = 0, size: int = IN, power: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q
    return (turned * torch.arange(1, size + 1) ** -power) @ turned.mT


def textbook(matrix: Tensor, rank: int) -> Tensor:
    """The leading eigenpairs as they are, all others at their mean."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clone()
    values[:-rank] = values[:-rank].mean()
    return (vectors * values) @ vectors.mT


def power_of(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.mT


def truncated(matrix: Tensor, rank: int = RANK) -> InputMetric:
    trace = float(matrix.trace())
    found = leading_pairs(lambda x: matrix @ x, (len(matrix), rank), trace, like=matrix)
    return InputMetric(len(matrix), found.even, found.rows)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 5e-3), (torch.float32, 5e-3)])
def test_leading_directions_and_an_even_rest(dtype: torch.dtype, bound: float):
    C = second_moment()
    found = truncated(C.to(dtype)).dense(C)
    expected = textbook(C, RANK)
    assert float((found - expected).norm() / expected.norm()) < bound
    assert float(found.trace()) == pytest.approx(float(C.trace()), rel=1e-6)


def test_the_share_that_is_lost_is_the_traces():
    C = second_moment()
    found = leading_pairs(lambda x: C @ x, (IN, RANK), float(C.trace()), like=C)
    values = torch.linalg.eigvalsh(C)
    assert found.lost == pytest.approx(float(values[:-RANK].sum() / values.sum()), rel=1e-3)
    assert found.rows.shape == (RANK, IN)
    products = found.rows @ found.rows.mT
    assert float((products - torch.diag(products.diagonal())).abs().max()) < 1e-10


def test_nothing_is_found_of_nothing():
    found = leading_pairs(lambda x: 0 * x, (IN, RANK), 0.0, like=torch.zeros(1).double())
    assert not bool(found.rows.any()) and found.lost == 0


@pytest.mark.parametrize("exponent", [0.5, -0.5, -1.0])
@pytest.mark.parametrize("form", ["truncated", "rows", "many rows", "matrix"])
def test_a_power_is_the_textbooks(form: str, exponent: float):
    C = second_moment(power=0.5)
    if form == "matrix":
        metric = InputMetric(IN, matrix=C)
    elif form == "truncated":
        metric = truncated(C)
    else:
        rows = torch.randn(5 if form == "rows" else IN, IN).double()
        metric = InputMetric(IN, 0.3, rows)
    M = torch.randn(7, IN).double()
    expected = M @ power_of(metric.dense(C), exponent)
    assert float((metric.times(M, exponent) - expected).norm() / expected.norm()) < 1e-10


def test_many_rows_are_cut_and_few_are_not():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(60, IN, generator=generator).double() * 0.8 ** torch.arange(60)[:, None]
    metric = InputMetric(IN, 0.01, rows)
    assert metric.leading(None) is metric
    assert metric.leading(15) is metric  # 60 rows are no more than 4 · 15
    assert metric.leading(25) is metric  # as wide as 4 · 25, nearly
    cut = metric.leading(10)
    assert cut.count == 10
    rest = rows.mT @ rows
    expected = textbook(rest, 10) + 0.01 * torch.eye(IN)
    assert float((cut.dense(rows) - expected).norm() / expected.norm()) < 2e-3
    assert truncates(24, 96) and not truncates(25, 96) and not truncates(10, 96, 40)


def test_the_mean_is_of_rows_while_they_are_few():
    metrics = [truncated(second_moment(seed), 4) for seed in range(3)]
    mean = mean_metric(metrics, metrics[0].rows)
    assert mean.thin and mean.count == 12
    expected = sum(m.dense(metrics[0].rows) for m in metrics) / 3
    assert float((mean.dense(expected) - expected).norm()) < 1e-12
    wide = mean_metric([truncated(second_moment(seed), 20) for seed in range(3)], expected)
    assert wide.matrix is not None


def adapters(ranks: tuple[int, ...] = (2, 3, 0)) -> LowRankStack:
    generator = torch.Generator().manual_seed(1)
    left = tuple(torch.randn(20, r, generator=generator).double() for r in ranks)
    return LowRankStack(
        left, tuple(torch.randn(r, IN, generator=generator).double() for r in ranks)
    )


def test_a_core_beside_rows_of_its_own_span_is_the_core():
    stack = adapters()
    inside = torch.randn(4, 5).double() @ torch.cat(stack.right)
    space, plain = core_space_beside(stack, [inside]), core_space(stack)
    assert space is not None and torch.equal(space.right, plain.right)
    assert torch.equal(space.cores, plain.cores)
    assert float((space.beside[0] @ space.right.mT - inside).norm() / inside.norm()) < 1e-12


def test_a_core_is_widened_by_rows_beyond_it():
    stack = adapters()
    rows = [torch.randn(2, IN).double(), stack.right[1], torch.randn(1, IN).double()]
    space = core_space_beside(stack, rows)
    assert space is not None and space.right.shape == (IN, 5 + 3)
    identity = space.right.mT @ space.right
    assert float((identity - torch.eye(8)).abs().max()) < 1e-12
    for block, seen in zip(rows, space.beside, strict=True):
        assert float((seen @ space.right.mT - block).norm() / block.norm()) < 1e-12
    for core, delta in zip(space.cores, stack.dense(), strict=True):
        assert float((space.expand(core).dense() - delta).norm()) < 1e-12 * float(delta.norm() + 1)


def test_a_core_that_is_not_small_is_none():
    assert core_space_beside(adapters(), [torch.randn(20, IN).double()]) is None
    none = core_space_beside(adapters((0, 0)), [torch.randn(2, IN).double()])
    assert none is not None and none.right.shape == (IN, 2)
