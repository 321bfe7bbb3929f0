"""RegMean with a flat spectrum in the metric of the inputs."""

from dataclasses import replace

import pytest
import torch
from tests.methods.test_core_metrics import NAMES, RANKS, apart, entries, projected, stack
from torch import Tensor

from eutectic import merge_matrices
from eutectic.errors import MethodError
from eutectic.linalg.lowrank import LowRankStack
from eutectic.methods import Context, get_method
from eutectic.methods.matrices import run_method
from eutectic.types import LayerStatistics

OUT, IN, EXPERTS, RIDGE = 20, 12, 3, 0.1


def deltas() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(EXPERTS, OUT, IN, generator=generator, dtype=torch.float64)


def statistics(rows: int = 200) -> list[LayerStatistics]:
    generator = torch.Generator().manual_seed(2)
    found: list[LayerStatistics] = []
    for t in range(EXPERTS):
        X = torch.randn(rows, IN, generator=generator, dtype=torch.float64)
        X = X * torch.arange(1, IN + 1) ** (-0.3 * t)
        found.append(LayerStatistics(gram=X.mT @ X, count=rows))
    return found


def metric(entry: LayerStatistics) -> Tensor:
    moment = entry.gram / entry.count
    return moment + RIDGE * moment.trace() / IN * torch.eye(IN, dtype=torch.float64)


def naive(
    stack: Tensor, entries: list[LayerStatistics], weights: list[float], rank: int, power: float
) -> Tensor:
    """The definition, by full decompositions."""
    metrics = [metric(entry) for entry in entries]
    whole = sum(weights)
    C = sum(w * m for w, m in zip(weights, metrics, strict=True)) / whole
    values, vectors = torch.linalg.eigh(C)
    root, back = (vectors * values**0.5) @ vectors.mT, (vectors * values**-0.5) @ vectors.mT
    both = zip(weights, stack, metrics, strict=True)
    nearest = sum(w * d @ m for w, d, m in both) / whole @ torch.linalg.inv(C)
    U, S, Vh = torch.linalg.svd(nearest @ root, full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    return (U * (S**power * S.sum() / (S**power).sum())) @ Vh @ back


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 0.0]])
@pytest.mark.parametrize(("rank", "power"), [(IN, 0.2), (IN, 0.0), (4, 0.5), (1, 1.0)])
def test_the_definition(weights: list[float], rank: int, power: float):
    merged = merge_matrices(
        "iso_regmean",
        deltas(),
        statistics=statistics(),
        weights=weights,
        spectrum=power,
        directions=None if rank == IN else rank,
    )
    assert torch.allclose(merged, naive(deltas(), statistics(), weights, rank, power), rtol=1e-8)
    assert torch.linalg.matrix_rank(merged) == rank


def test_whole_spectrum_is_regmean():
    own = merge_matrices("iso_regmean", deltas(), statistics=statistics(), spectrum=1.0)
    ridged = [LayerStatistics(gram=metric(e) * e.count, count=e.count) for e in statistics()]
    regmean = merge_matrices("regmean", deltas(), statistics=ridged, off_diagonal=1.0)
    assert torch.allclose(own, regmean, rtol=1e-8)


def test_white_inputs_give_iso_c():
    white = [LayerStatistics(gram=torch.eye(IN, dtype=torch.float64), count=1)] * EXPERTS
    own = merge_matrices("iso_regmean", deltas(), statistics=white, spectrum=0.0)
    assert torch.allclose(own * EXPERTS, merge_matrices("iso_c", deltas()), rtol=1e-8)


def test_a_rank_has_the_nearest_outputs():
    """No other matrix of that rank is nearer to the experts' outputs, the spectrum kept."""
    stack, metrics = deltas(), [metric(e) for e in statistics()]

    def error(candidate: Tensor) -> float:
        gaps = [candidate - delta for delta in stack]
        return sum(float((g @ m * g).sum()) for g, m in zip(gaps, metrics, strict=True))

    best = merge_matrices("iso_regmean", stack, statistics=statistics(), directions=3, spectrum=1.0)
    U, S, Vh = torch.linalg.svd(
        merge_matrices("iso_regmean", stack, statistics=statistics(), spectrum=1.0)
    )
    assert error(best) < error((U[:, :3] * S[:3]) @ Vh[:3]) - 1e-3
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        U, S, Vh = torch.linalg.svd(best)
        moved = U[:, :3] + 1e-2 * torch.randn(OUT, 3, generator=generator, dtype=torch.float64)
        assert error(best) < error((moved * S[:3]) @ Vh[:3])


@pytest.mark.parametrize("directions", [None, 3])
def test_thin_factors_and_few_rows(directions: int | None):
    generator = torch.Generator().manual_seed(4)
    wide = 60
    left = [torch.randn(40, r, generator=generator, dtype=torch.float64) for r in (1, 3, 4)]
    right = [torch.randn(r, wide, generator=generator, dtype=torch.float64) for r in (1, 3, 4)]
    span = torch.cat(right)
    rows = [torch.randn(5, 8, generator=generator, dtype=torch.float64) @ span for _ in range(3)]
    few = [
        LayerStatistics(gram_factor=own, gram_diagonal=torch.full((wide,), 0.1 * t), count=4 + t)
        for t, own in enumerate(rows)
    ]
    stack = LowRankStack(tuple(left), tuple(right))
    how = {"statistics": few, "directions": directions}
    thin = merge_matrices("iso_regmean", stack, **how)
    whole = [LayerStatistics(gram=e.dense_gram(), count=e.count) for e in few]
    dense = merge_matrices(
        "iso_regmean", stack.dense(), statistics=whole, directions=directions, metric_rank="full"
    )
    assert torch.allclose(thin, dense, rtol=1e-6, atol=1e-8)


def test_wide_metrics(monkeypatch: pytest.MonkeyPatch):
    """The polynomial comes near the eigenproblem, from a Gram and from rows and a diagonal."""
    monkeypatch.setattr("eutectic.linalg.metric.WHOLE_WIDTH", 8)
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randn(9, IN, generator=generator, dtype=torch.float64) for _ in range(3)]
    diagonal = torch.linspace(0.1, 0.3, IN, dtype=torch.float64)
    thin = [LayerStatistics(gram_factor=r, gram_diagonal=diagonal, count=9) for r in rows]
    whole = [LayerStatistics(gram=e.dense_gram(), count=9) for e in thin]
    how = {"metric_rank": 3, "metric_degree": 24}
    exact = merge_matrices("iso_regmean", deltas(), statistics=whole, metric_rank="full")
    for held in (thin, whole):
        near = merge_matrices("iso_regmean", deltas(), statistics=held, **how)
        assert (near - exact).norm() < 1e-3 * exact.norm()


def test_refusals():
    with pytest.raises(MethodError, match="at least 0"):
        merge_matrices("iso_regmean", deltas(), statistics=statistics(), weights=[1.0, -1.0, 1.0])
    with pytest.raises(MethodError, match="directions"):
        merge_matrices("iso_regmean", deltas(), statistics=statistics(), directions=0)


@pytest.mark.parametrize("directions", [None, 4])
@pytest.mark.parametrize("twice", [False, True])
def test_grams_between_shared_rows_stay_there(directions: int | None, twice: bool):
    """In the core it is the method on the expanded deltas and Grams, and no factor is expanded."""
    thin = stack(twice)
    given = entries(thin)
    method = get_method("iso_regmean")
    parameters = method.parameters(directions=directions)
    context = Context(weights=(1.0, 0.5, 2.0), experts=NAMES, statistics=tuple(given))
    assert method.thin is not None
    found = method.thin(thin, parameters, context)
    assert found is not None
    assert found.left.shape[1] <= sum(RANKS)
    whole = replace(context, statistics=tuple(projected(given)))
    wanted = run_method(
        method, thin.dense(), method.parameters(directions=directions, metric_rank="full"), whole
    ).delta
    assert apart(found.dense(), wanted) < 1e-8
    assert apart(run_method(method, thin, parameters, context).delta, wanted) < 1e-8
    # Dense deltas from such Grams, a silent expert, and one without inputs.
    assert apart(run_method(method, thin.dense(), parameters, context).delta, wanted) < 1e-6
    silent = replace(context, weights=(1.0, 0.0, 2.0), statistics=(given[0], None, given[2]))
    dense = replace(silent, statistics=(projected(given)[0], None, projected(given)[2]))
    one = method.thin(thin, parameters, silent)
    assert one is not None
    other = run_method(method, thin.dense(), parameters, dense).delta
    assert apart(one.dense(), other) < 1e-6


def test_factors_are_expanded_where_the_core_is_no_smaller():
    method = get_method("iso_regmean")
    thin = stack()
    context = Context(weights=(1.0,) * 3, experts=NAMES, statistics=tuple(entries(thin)))
    assert method.thin is not None
    assert method.thin(thin, method.parameters(support="full"), context) is None
    wide = LowRankStack(thin.left * 4, thin.right * 4)
    many = Context(weights=(1.0,) * 12, experts=tuple(map(str, range(12))), statistics=None)
    assert method.thin(wide, method.parameters(), many) is None
