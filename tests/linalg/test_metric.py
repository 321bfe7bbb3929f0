"""Powers of metrics against the eigendecomposition."""

import pytest
import torch
from torch import Tensor

from eutectic.linalg.core import core_space, core_space_beside
from eutectic.linalg.lowrank import LowRankStack
from eutectic.linalg.metric import InputMetric, Metric, mean_metric
from eutectic.linalg.remembered import digest, remembered
from eutectic.linalg.wide_metric import WideMetric, fitted, leading_pairs

IN, RANK = 96, 8


def second_moment(seed: int = 0, size: int = IN, power: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q
    return (turned * torch.arange(1, size + 1) ** -power) @ turned.mT


def power_of(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.mT


def wide(C: Tensor, degree: int, dtype: torch.dtype = torch.float64) -> WideMetric:
    return WideMetric(IN, 0.02, matrix=5 * C.to(dtype), scale=0.2, rank=RANK, degree=degree)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_leading_pairs_are_the_eigenpairs_and_what_they_leave_is_exact():
    C = second_moment()
    found = leading_pairs(lambda x: x @ C, (IN, RANK), float(C.trace()), like=C)
    values = torch.linalg.eigvalsh(C).flip(0)
    assert found.values.tolist() == pytest.approx(values[:RANK].tolist(), rel=2e-2)
    assert found.values.tolist()[:4] == pytest.approx(values[:4].tolist(), rel=1e-4)
    assert found.next == pytest.approx(float(values[RANK]), rel=0.1)
    assert found.lost == pytest.approx(float(values[RANK:].sum()), rel=1e-2)
    identity = found.vectors.mT @ found.vectors
    assert float((identity - torch.eye(RANK)).abs().max()) < 1e-12
    kept = (found.vectors.mT @ C @ found.vectors).trace()
    assert found.lost == pytest.approx(float(C.trace() - kept), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_eigenvalues_beyond_a_block_are_not_forgotten(dtype: torch.dtype):
    """A Krylov space of blocks of 4 holds 4 of 30 equal eigenvalues; the rest must not run away."""
    values = torch.cat([torch.full((30,), 10.0), torch.linspace(1, 0.01, IN - 30)]).double()
    turned = torch.linalg.qr(torch.randn(IN, IN).double()).Q
    C = (turned * values) @ turned.mT
    found = leading_pairs(lambda x: x @ C.to(dtype), (IN, RANK), float(C.trace()), like=C.to(dtype))
    assert found.next > 7
    M = torch.randn(7, IN).double()
    metric = WideMetric(IN, 0.5, matrix=C.to(dtype), rank=RANK, degree=48)
    for exponent in (0.5, -0.5):
        expected = M @ power_of(C + 0.5 * torch.eye(IN), exponent)
        assert apart(metric.times(M, exponent), expected) < 1e-2


def test_a_polynomial_of_high_degree_does_not_run_away_beyond_the_spectrum():
    """The end of a spectrum without gaps is found the better, the faster a polynomial grows."""
    values = (1 - 1.4 * torch.arange(1024) / 1024).clamp_min(0).double()
    M = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0))
    expected = M.double() * (0.03 + values) ** -0.5
    for degree in (18, 32, 64):
        metric = WideMetric(1024, 0.03, matrix=values.float().diag(), degree=degree)
        assert apart(metric.times(M, -0.5), expected) < 0.03


def test_a_positive_power_takes_a_third_of_the_degree():
    products: list[int] = []

    class Counted(WideMetric):
        def _act(self, x: Tensor) -> Tensor:
            products.append(len(x))
            return super()._act(x)

    C, M = second_moment(), torch.randn(7, IN).double()
    metric = Counted(IN, 0.02, matrix=C, rank=RANK, degree=9)
    metric.times(M, 0.5)
    before = products.count(7)
    metric.times(M, -0.5)
    assert (before, products.count(7) - before) == (3, 9)


@pytest.mark.parametrize(("smallest", "dtype"), [(1e-2, torch.float32), (1e-6, torch.float64)])
def test_float32_metrics_are_decomposed_in_float64_where_ill_conditioned(
    smallest: float, dtype: torch.dtype
):
    turned = torch.linalg.qr(torch.randn(IN, IN).double()).Q
    C = (turned * torch.logspace(0, torch.tensor(smallest).log10(), IN).double()) @ turned.mT
    metric, M = InputMetric(IN, matrix=C.float()), torch.randn(7, IN)
    assert metric._pairs[0].dtype == dtype  # pyright: ignore[reportPrivateUsage]
    assert apart(metric.times(M, 0.5), M.double() @ power_of(C, 0.5)) < 1e-5


def test_nothing_is_found_of_nothing():
    found = leading_pairs(lambda x: 0 * x, (IN, RANK), 0.0, like=torch.zeros(1).double())
    assert not bool(found.values.any()) and found.lost == 0


@pytest.mark.parametrize("exponent", [0.5, -0.5, 0.3])
def test_a_fitted_polynomial_nears_the_power(exponent: float):
    weights = fitted(exponent, 0.5, 3.5, 20)
    x = torch.linspace(-1, 1, 50).double()
    series = sum(w * torch.cos(j * torch.arccos(x)) for j, w in enumerate(weights))
    assert apart(torch.as_tensor(series), (2 + 1.5 * x) ** exponent) < 1e-6


@pytest.mark.parametrize("exponent", [0.5, -0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wide_power_nears_the_textbooks_with_its_degree(exponent: float, dtype: torch.dtype):
    C = second_moment()
    M = torch.randn(7, IN).double()
    expected = M @ power_of(C + 0.02 * torch.eye(IN), exponent)
    errors = [apart(wide(C, n, dtype).times(M, exponent), expected) for n in (0, 1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 2e-2 and errors[-1] < 1e-4


@pytest.mark.parametrize("degree", [0, 4])
def test_an_even_metric_is_exact_at_any_degree(degree: int):
    M = torch.randn(7, IN).double()
    metric = WideMetric(IN, 0.5, matrix=torch.eye(IN).double(), rank=RANK, degree=degree)
    assert apart(metric.times(M, -0.5), M / 1.5**0.5) < 1e-6
    nothing = WideMetric(IN, 0.5, matrix=torch.zeros(IN, IN).double(), rank=RANK, degree=degree)
    assert apart(nothing.times(M, -0.5), M / 0.5**0.5) < 1e-12


def test_rows_with_a_diagonal_are_the_matrix_of_them():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(30, IN, generator=generator).double() * 0.8 ** torch.arange(30)[:, None]
    rest = torch.rand(IN, generator=generator).double()
    M = torch.randn(7, IN, generator=generator).double()
    one = WideMetric(IN, 0.1, rows=rows, diagonal=rest, scale=2.0, rank=RANK)
    other = WideMetric(IN, 0.1, matrix=rows.mT @ rows + torch.diag(rest), scale=2.0, rank=RANK)
    assert one.trace == pytest.approx(other.trace)
    assert apart(one.times(M, 0.5), other.times(M, 0.5)) < 1e-9


@pytest.mark.parametrize("exponent", [0.5, -0.5, -1.0])
@pytest.mark.parametrize("form", ["rows", "many rows", "matrix"])
def test_a_power_is_the_textbooks(form: str, exponent: float):
    C = second_moment(power=0.5)
    rows = torch.randn(5 if form == "rows" else IN, IN).double()
    metric = InputMetric(IN, matrix=C) if form == "matrix" else InputMetric(IN, 0.3, rows)
    M = torch.randn(7, IN).double()
    assert apart(metric.times(M, exponent), M @ power_of(metric.dense(C), exponent)) < 1e-10


def test_the_mean_is_of_rows_while_they_are_few():
    metrics = [InputMetric(IN, 0.1 * n, torch.randn(4, IN).double()) for n in range(1, 4)]
    mean = mean_metric(metrics, torch.zeros(1))
    assert isinstance(mean, InputMetric) and mean.thin and mean.count == 12
    expected = sum((m.dense(torch.zeros(1)) for m in metrics), torch.zeros(IN, IN)) / 3
    assert apart(mean.dense(expected), expected) < 1e-12
    many = [InputMetric(IN, 0.1, torch.randn(20, IN).double()) for _ in range(3)]
    mean = mean_metric(many, torch.zeros(1))
    assert isinstance(mean, InputMetric) and mean.matrix is not None


@pytest.mark.parametrize("forms", ["matrices", "rows", "both", "few rows beside"])
def test_the_mean_of_wide_metrics_is_that_of_their_matrices(forms: str):
    rows = torch.randn(9, IN).double()
    rest = torch.rand(IN).double()
    held: list[Metric] = [
        WideMetric(IN, 0.1, matrix=second_moment(1), scale=3.0, rank=RANK, degree=48),
        WideMetric(IN, 0.2, rows=rows, diagonal=rest, scale=0.5, rank=RANK, degree=48),
        InputMetric(IN, 1.0, rows[:2]),
        InputMetric(IN, 0.3),
    ]
    eye = torch.eye(IN).double()
    dense = [
        0.1 * eye + 3 * second_moment(1),
        0.2 * eye + 0.5 * (rows.mT @ rows + torch.diag(rest)),
        eye + rows[:2].mT @ rows[:2],
        0.3 * eye,
    ]
    chosen = {"matrices": [0, 0], "rows": [1, 1], "both": [0, 1, 2, 3], "few rows beside": [1, 2]}
    mean = mean_metric([held[i] for i in chosen[forms]], rows)
    expected = sum((dense[i] for i in chosen[forms]), 0 * eye) / len(chosen[forms])
    M = torch.randn(5, IN).double()
    assert isinstance(mean, WideMetric)
    assert apart(mean.times(M, 0.5), M @ power_of(expected, 0.5)) < 2e-3


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


def test_rows_that_are_the_right_factors_are_read_off_their_decomposition():
    wide = adapters()
    stack = LowRankStack(
        tuple(f.float() for f in wide.left), tuple(f.float() * 3 for f in wide.right)
    )
    own = torch.cat([factor.double() for factor in stack.right])
    space = core_space_beside(stack, [own, own.flip(0)])
    assert space is not None and space.right.shape == (IN, 5)
    for block, seen in zip((own, own.flip(0)), space.beside, strict=True):
        assert float((seen @ space.right.mT - block).norm() / block.norm()) < 1e-12
    for blocks in ([own], [own, own]):  # the same rows: neither is multiplied
        space = core_space_beside(stack, blocks)
        assert space is not None and len(space.beside) == len(blocks)
        assert (space.inverse is not None) == (len(blocks) == 1)
        for seen in space.beside:
            assert float((seen @ space.right.mT - own).norm() / own.norm()) < 1e-12
            if space.inverse is not None:
                apart_by = seen @ space.inverse.mT - torch.eye(5).double()
                assert float(apart_by.norm()) < 1e-12


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


def test_equal_metrics_are_decomposed_once(monkeypatch: pytest.MonkeyPatch):
    from eutectic.linalg import lapack

    made: list[int] = []
    eigh = lapack.eigh
    monkeypatch.setattr(lapack, "eigh", lambda m: made.append(len(m)) or eigh(m))
    C, M = second_moment(11), torch.randn(3, IN).double()
    keys = [digest(C, 1.0), digest(C.clone(), 1.0), digest(C, 2.0), ""]
    assert keys[0] == keys[1] != keys[2]
    results = [InputMetric(IN, matrix=C, key=key).times(M, 0.5) for key in keys]
    assert made == [IN] * 3 and all(torch.equal(results[0], r) for r in results[1:3])
    assert apart(results[3], results[0]) < 1e-12  # kept is C^p, alone the decomposition is enough
    assert digest(C, "") == "" and digest(C) != digest(C.float()) != digest(C.view(-1))


def test_what_failed_is_tried_again():
    def fail() -> int:
        raise ValueError

    key = digest("what failed")
    with pytest.raises(ValueError):
        remembered(key, fail)
    assert remembered(key, lambda: 3) == 3 == remembered(key, fail)


def test_threads_wait_for_one_another():
    from concurrent.futures import ThreadPoolExecutor
    from time import sleep

    made: list[int] = []

    def make() -> int:
        made.append(1)
        sleep(0.05)
        return 7

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: remembered(digest("threads"), make), range(4)))
    assert found == [7] * 4 and made == [1]
