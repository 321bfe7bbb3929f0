"""The pure measures against naive transcriptions of their formulas, and their limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eutectic.errors import RequestError
from eutectic.linalg.lowrank import LowRank
from eutectic.linalg.svd import Triplets
from eutectic.reporting import alignment_rank, subspace_alignment_ratio
from eutectic.reporting.matrix_measures import (
    cosine,
    effective_rank,
    energy,
    output_energy,
    sign_conflicts,
    significant_triplets,
    singular_task_interference,
    stable_rank,
    subspace_overlap,
)
from eutectic.types import LayerStatistics

WIDE = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def naive_sar(merged: Tensor, delta: Tensor, error: float) -> tuple[int, float]:
    """Add left singular vectors until what is left of Δ_M is small enough."""
    U = torch.linalg.svd(merged).U
    for q in range(len(U) + 1):
        P = U[:, :q] @ U[:, :q].T
        if torch.linalg.norm(merged - P @ merged) <= error * torch.linalg.norm(merged):
            return q, float(torch.linalg.norm(P @ delta) / torch.linalg.norm(delta))
    raise AssertionError


@pytest.mark.parametrize("error", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_sar_is_the_formula(error, shape):
    tasks = torch.stack([randn(*shape, seed=s) for s in range(3)])
    left, _ = torch.linalg.qr(randn(shape[0], 9, seed=7))
    decay = torch.tensor([0.5**i for i in range(9)], dtype=WIDE)
    merged = left * decay @ torch.linalg.qr(randn(shape[1], 9, seed=8)).Q.T
    found = subspace_alignment_ratio(merged, tasks, error)
    expected = [naive_sar(merged, delta, error) for delta in tasks]
    assert 0 < expected[0][0] < 9
    assert alignment_rank(merged, error) == expected[0][0]
    assert torch.allclose(found, torch.tensor([sar for _, sar in expected], dtype=WIDE), atol=1e-10)


def test_sar_knows_no_scale():
    tasks = [randn(8, 6, seed=s) for s in range(2)]
    merged = tasks[0] + 0.1 * tasks[1]
    expected = subspace_alignment_ratio(merged, tasks, 0.2)
    scaled = subspace_alignment_ratio(-1e-30 * merged, [1e30 * t for t in tasks], 0.2)
    assert torch.allclose(scaled, expected, rtol=1e-9)


def test_sar_of_a_model_with_itself_leaves_the_error():
    delta = torch.diag(torch.tensor([100.0, 4.0, 3.0]))
    assert alignment_rank(delta) == 1  # leaves 5 of 100.1
    expected = 100 / math.hypot(100, 4, 3)
    assert float(subspace_alignment_ratio(delta, [delta])) == pytest.approx(expected)


def test_sar_of_zero():
    task, zero = randn(4, 3), torch.zeros(4, 3)
    assert alignment_rank(zero) == 0
    assert subspace_alignment_ratio(zero, [task]).tolist() == [0.0]
    found = subspace_alignment_ratio(task, [zero, task])
    assert math.isnan(float(found[0]))
    assert float(found[1]) > 0.9


def test_sar_refuses_what_does_not_fit():
    with pytest.raises(RequestError, match="between 0 and 1, got 1.5"):
        alignment_rank(randn(3, 3), 1.5)
    with pytest.raises(RequestError, match=r"\[3, 4\], the merged one \[4, 3\]"):
        subspace_alignment_ratio(randn(4, 3), [randn(3, 4)])


def test_ranks_and_energy():
    values = torch.tensor([2.0, 1.0, 1.0])
    assert stable_rank(values) == pytest.approx(6 / 4)
    assert energy(values, 2) == pytest.approx(5 / 6)
    assert effective_rank(values) == pytest.approx(2 * math.sqrt(2))  # entropy 1.5 bits
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    empty = torch.zeros(0)
    assert all(map(math.isnan, (stable_rank(empty), effective_rank(empty), energy(empty, 1))))


def test_factors_have_the_spectrum_of_their_product():
    thin = LowRank(randn(12, 3), randn(3, 10, seed=1))
    found, dense = significant_triplets(thin), significant_triplets(thin.dense())
    assert len(found.S) == len(dense.S) == 3
    assert torch.allclose(found.S, dense.S, rtol=1e-8)
    assert len(significant_triplets(torch.zeros(4, 5)).S) == 0


def leading(delta: Tensor, count: int) -> Triplets:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return Triplets(U[:, :count], S[:count], Vh[:count].T)


def test_singular_task_interference_is_the_formula():
    tasks = [leading(randn(7, 9, seed=s), 3) for s in range(3)]
    U = torch.cat([t.U for t in tasks], 1)
    V = torch.cat([t.V for t in tasks], 1)
    S = torch.diag(torch.cat([t.S for t in tasks]))
    eye = torch.eye(9, dtype=WIDE)
    expected = (U.T @ U - eye) @ S @ (V.T @ V - eye)
    found = singular_task_interference(tasks)
    assert found == pytest.approx(float(expected.abs().sum()))
    assert found > 1
    assert singular_task_interference(tasks[:1]) == pytest.approx(0, abs=1e-12)


def test_orthogonal_outputs_do_not_interfere():
    first, second = torch.zeros(6, 4, dtype=WIDE), torch.zeros(6, 4, dtype=WIDE)
    first[:3], second[3:] = randn(3, 4), randn(3, 4, seed=1)
    found = [leading(first, 2), leading(second, 2)]
    assert singular_task_interference(found) == pytest.approx(0, abs=1e-12)
    assert subspace_overlap(found[0].U, found[1].U) == pytest.approx(0, abs=1e-12)
    assert subspace_overlap(found[0].V, found[1].V) > 0.05


def test_overlap_of_a_space_inside_another_is_one():
    basis = torch.linalg.qr(randn(8, 5)).Q
    assert subspace_overlap(basis, basis[:, :2]) == pytest.approx(1)
    assert math.isnan(subspace_overlap(basis, basis[:, :0]))


def test_pairs_entry_by_entry():
    first = torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    second = torch.tensor([[1.0, 1.0], [-1.0, 5.0]])
    assert sign_conflicts(first, second) == pytest.approx(2 / 3)
    assert cosine(first, second) == pytest.approx(-2 / math.sqrt(6 * 28))
    zero = torch.zeros(2, 2)
    assert math.isnan(cosine(first, zero))
    assert math.isnan(sign_conflicts(first, zero))


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("form", ["gram", "factor", "truncated"])
def test_output_energy_is_that_of_the_outputs(form, thin):
    inputs = randn(5, 6, seed=2)
    delta = LowRank(randn(4, 2), randn(2, 6, seed=1))
    rest = torch.arange(6.0, dtype=WIDE)
    record = {
        "gram": LayerStatistics(gram=inputs.T @ inputs, count=5),
        "factor": LayerStatistics(gram_factor=inputs, count=5),
        "truncated": LayerStatistics(gram_factor=inputs, gram_diagonal=rest, count=5),
    }[form]
    if form == "truncated":
        inputs = torch.cat([inputs, torch.diag(rest.sqrt())])
    expected = float((inputs @ delta.dense().T).square().sum())
    assert output_energy(delta if thin else delta.dense(), record) == pytest.approx(expected)


def test_output_energy_refuses_a_gram_of_another_layer():
    record = LayerStatistics(gram=torch.eye(5), count=5)
    with pytest.raises(RequestError, match=r"a Gram of 5 inputs .* \[4, 6\]"):
        output_energy(randn(4, 6), record)
