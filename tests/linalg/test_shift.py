"""Guards cuts in the metric of inputs: against a naive root, and their laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eutectic.linalg.lowrank import LowRank
from eutectic.linalg.range_finder import compressed
from eutectic.linalg.shift import SecondMoment, compressed_by_shift, shift_of

OUT, IN, RANK = 14, 20, 9


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def thin(seed: int = 1) -> LowRank:
    return LowRank(random(OUT, RANK, seed=seed), random(RANK, IN, seed=seed + 50))


def moments() -> dict[str, SecondMoment]:
    rows, inputs = random(4, IN, seed=7), random(60, IN, seed=8) * 0.7 ** torch.arange(IN)
    even, uneven = torch.full((IN,), 0.3, dtype=torch.float64), random(IN, seed=9).square() + 0.1
    gram = inputs.mT @ inputs / 60
    return {
        "even": SecondMoment(even),
        "rows": SecondMoment(even, rows),
        "rows and diagonal": SecondMoment(uneven, rows),
        "matrix": SecondMoment(even * 0.01, matrix=gram),
        "all": SecondMoment(uneven, rows, gram),
    }


def dense(moment: SecondMoment) -> Tensor:
    total = torch.diag(moment.diagonal)
    if moment.rows is not None:
        total = total + moment.rows.mT @ moment.rows
    return total if moment.matrix is None else total + moment.matrix


def naive(matrix: Tensor, C: Tensor, rank: int) -> tuple[Tensor, float]:
    """Return SVD_r(M·C^{1/2})·C^{-1/2} and the share that it loses."""
    values, vectors = torch.linalg.eigh(C)
    U, S, Vh = torch.linalg.svd((matrix @ vectors * values.sqrt()) @ vectors.mT)
    near = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    lost = 1 - float(S[:rank].square().sum() / S.square().sum())
    return (near @ vectors / values.sqrt()) @ vectors.mT, lost


@pytest.mark.parametrize("kind", list(moments()))
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("factored", [True, False])
def test_it_is_the_best_product_in_the_metric_mapped_back(
    kind: str, rank: int, factored: bool
) -> None:
    moment, matrix = moments()[kind], thin()
    wanted, lost = naive(matrix.dense(), dense(moment), rank)
    found = compressed_by_shift(matrix if factored else matrix.dense(), moment, rank=rank)
    product = found.factors.left @ found.factors.right
    torch.testing.assert_close(product, wanted, rtol=1e-6, atol=1e-8)
    assert found.lost == pytest.approx(lost, abs=1e-9)
    kept = product.square().sum() / matrix.dense().square().sum()
    assert found.factors.lost == pytest.approx(1 - float(kept), abs=1e-9)
    assert found.factors.rank == rank
    left, right = found.factors.left, found.factors.right
    torch.testing.assert_close(left.square().sum(0), right.square().sum(1))  # balanced


@pytest.mark.parametrize("factored", [True, False])
def test_nothing_else_of_its_rank_is_nearer_in_the_outputs(factored: bool) -> None:
    moment, matrix = moments()["matrix"], thin()
    found = compressed_by_shift(matrix if factored else matrix.dense(), moment, rank=3)
    own = dense(moment)

    def error(product: Tensor) -> float:
        rest = matrix.dense() - product
        return float(torch.trace(rest @ own @ rest.mT))

    best = error(found.factors.left @ found.factors.right)
    plain = compressed(matrix, rank=3)
    assert best < 0.999 * error(plain.left @ plain.right)
    for seed in range(20):
        nudged = found.factors.left + 1e-3 * random(OUT, 3, seed=seed)
        assert error(nudged @ found.factors.right) >= best


@pytest.mark.parametrize("how", [{"rank": 4}, {"energy": 0.9}, {"rank": 3, "energy": 0.99}])
@pytest.mark.parametrize("factored", [True, False])
def test_an_even_metric_is_none(how: dict[str, Any], factored: bool) -> None:
    matrix = thin() if factored else thin().dense()
    plain = compressed(matrix, **how)
    found = compressed_by_shift(matrix, moments()["even"], **how)
    assert found.factors.rank == plain.rank
    torch.testing.assert_close(
        found.factors.left @ found.factors.right, plain.left @ plain.right, rtol=1e-6, atol=1e-8
    )
    assert found.factors.lost == pytest.approx(plain.lost, abs=1e-9)
    assert found.lost == pytest.approx(plain.lost, abs=1e-9)


@pytest.mark.parametrize("kind", list(moments()))
@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("rank", [RANK, 200])
def test_a_rank_that_it_has_loses_nothing(kind: str, factored: bool, rank: int) -> None:
    matrix = thin() if factored else thin().dense()
    found = compressed_by_shift(matrix, moments()[kind], rank=rank)
    torch.testing.assert_close(
        found.factors.left @ found.factors.right, thin().dense(), rtol=1e-6, atol=1e-7
    )
    assert max(found.lost, found.factors.lost) < 1e-9


def test_inputs_may_be_turned() -> None:
    """Of M·O and OᵀCO the product is that of M and C, times O."""
    turn = torch.linalg.qr(random(IN, IN, seed=3)).Q
    moment, matrix = moments()["all"], thin()
    turned = SecondMoment(
        torch.full((IN,), 1e-9, dtype=torch.float64), matrix=turn.mT @ dense(moment) @ turn
    )
    found = compressed_by_shift(LowRank(matrix.left, matrix.right @ turn), turned, rank=4).factors
    wanted = compressed_by_shift(matrix, moment, rank=4).factors
    torch.testing.assert_close(
        found.left @ found.right, wanted.left @ wanted.right @ turn, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_energy_is_that_of_the_outputs(energy: float) -> None:
    moment, matrix = moments()["matrix"], thin()
    found = compressed_by_shift(matrix, moment, energy=energy)
    _, fewer = naive(matrix.dense(), dense(moment), found.factors.rank - 1)
    assert found.lost <= 1 - energy < fewer


def test_zero_is_of_rank_zero() -> None:
    for matrix in (torch.zeros(OUT, IN), LowRank(torch.zeros(OUT, 2), torch.zeros(2, IN))):
        found = compressed_by_shift(matrix, moments()["rows"], rank=1)
        assert found.factors.rank == 0
        assert found.lost == found.factors.lost == 0


def flat(moment: SecondMoment, deltas: list[LowRank]) -> LowRank:
    """Return UVᵀC^{-1/2} of Σ Δ_tC^{1/2} = U S Vᵀ: a merge that is flat in the metric."""
    values, vectors = torch.linalg.eigh(dense(moment))
    total = torch.stack([d.dense() for d in deltas]).sum(0)
    rank = sum(d.left.shape[1] for d in deltas)
    U, _, Vh = torch.linalg.svd((total @ vectors * values.sqrt()) @ vectors.mT)
    return LowRank(U[:, :rank], (Vh[:rank] @ vectors / values.sqrt()) @ vectors.mT)


@pytest.mark.parametrize("kind", ["rows", "matrix", "all"])
@pytest.mark.parametrize("form", ["thin", "dense"])
def test_of_a_flat_merge_those_are_kept_that_the_experts_use(kind: str, form: str) -> None:
    """The leading eigenvectors of Σ Δ_tC_tΔ_tᵀ in its range, against a naive computation."""
    moment, own = moments()[kind], list(moments().values())[:3]
    deltas = [LowRank(random(OUT, 3, seed=t), random(3, IN, seed=20 + t)) for t in range(3)]
    merged = flat(moment, deltas)
    given = merged if form == "thin" else merged.dense()
    among = [
        shift_of(d if form == "thin" else d.dense(), C) for d, C in zip(deltas, own, strict=True)
    ]
    found = compressed_by_shift(given, moment, rank=4, among=among)
    basis = torch.linalg.qr(merged.left).Q
    parts = [d.dense() @ dense(C) @ d.dense().mT for d, C in zip(deltas, own, strict=True)]
    inside = basis.mT @ torch.stack(parts).sum(0) @ basis
    U = basis @ torch.linalg.eigh(inside).eigenvectors[:, -4:]
    torch.testing.assert_close(
        found.factors.left @ found.factors.right, U @ U.mT @ merged.dense(), rtol=1e-5, atol=1e-6
    )
    assert found.lost == pytest.approx(1 - 4 / 9, abs=1e-6)


def test_experts_of_too_few_directions_leave_the_choice_open() -> None:
    moment = moments()["rows"]
    deltas = [LowRank(random(OUT, 3, seed=t), random(3, IN, seed=20 + t)) for t in range(3)]
    found = compressed_by_shift(
        flat(moment, deltas), moment, rank=4, among=[shift_of(deltas[0], moment)]
    )
    assert found.factors.rank == 4
    assert found.lost == pytest.approx(1 - 4 / 9, abs=1e-6)


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize(("values", "flat"), [((1, 1, 1, 1), True), ((4, 2, 1, 1), False)])
def test_others_choose_among_equal_directions_alone(
    values: tuple[float, ...], flat: bool, factored: bool
) -> None:
    """And never so that more is lost than the energy allows."""
    U = torch.linalg.qr(random(OUT, 4)).Q * torch.tensor(values, dtype=torch.float64)
    V = torch.linalg.qr(random(IN, 4, seed=1)).Q
    matrix, even = LowRank(U, V.mT), SecondMoment(torch.ones(IN, dtype=torch.float64))
    among = [U[:, 2:] / U[:, 2:].norm(dim=0) * 3]
    given = matrix if factored else matrix.dense()
    cut = compressed_by_shift(given, even, rank=2, among=among)
    expected = (U[:, 2:] @ V[:, 2:].mT) if flat else (U[:, :2] @ V[:, :2].mT)
    torch.testing.assert_close(cut.factors.left @ cut.factors.right, expected)
    for energy in (0.5, 0.9):
        kept = compressed_by_shift(given, even, energy=energy, among=among)
        assert kept.lost <= 1 - energy + 1e-9
        assert kept.factors.lost == pytest.approx(kept.lost, abs=1e-9)
