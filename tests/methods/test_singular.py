"""TSV-M: parity with the formula written out, identities, and rank deficiency."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eutectic.errors import MethodError
from eutectic.linalg import leading
from eutectic.methods import get_method, merge_matrices
from eutectic.methods.singular import kept_per_expert


def random_deltas(experts: int, out: int, inner: int, rank: int | None = None, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(experts, out, inner, generator=generator)
    left = torch.randn(experts, out, rank, generator=generator)
    return left @ torch.randn(experts, rank, inner, generator=generator)


def textbook(deltas: Tensor, k: int) -> Tensor:
    parts = [torch.linalg.svd(d, full_matrices=False) for d in deltas.double()]
    polars = []
    for blocks in ([U[:, :k] for U, _, _ in parts], [Vh[:k].T for _, _, Vh in parts]):
        u, _, vh = torch.linalg.svd(torch.cat(blocks, 1), full_matrices=False)
        polars.append(u @ vh)
    return (polars[0] * torch.cat([S[:k] for _, S, _ in parts])) @ polars[1].T


def error(ours: Tensor, reference: Tensor) -> float:
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("experts", [1, 3, 8])
@pytest.mark.parametrize("shape", [(40, 40), (24, 70), (70, 24), (140, 120)])
def test_is_its_formula(shape, experts, precision):
    deltas = random_deltas(experts, *shape)
    ours = merge_matrices("tsv_m", deltas, precision=precision)
    assert error(ours, textbook(deltas, min(shape) // experts)) <= 1e-4


def test_rank_fraction():
    deltas = random_deltas(2, 40, 30)
    ours = merge_matrices("tsv_m", deltas, rank_fraction=0.1)
    assert error(ours, textbook(deltas, 3)) <= 1e-5


@pytest.mark.parametrize("rank", [None, 4])
def test_one_expert_is_returned(rank):
    deltas = random_deltas(1, 30, 20, rank)
    assert error(merge_matrices("tsv_m", deltas), deltas[0]) <= 1e-5


def test_null_directions_of_low_rank_experts_do_not_disturb():
    """As many triplets are kept as an expert has, so more room changes nothing."""
    deltas = random_deltas(3, 60, 50, rank=4)
    assert error(merge_matrices("tsv_m", deltas), textbook(deltas, 4)) <= 1e-5


def test_shared_directions_count_once():
    """T copies: the leading int(r/T) triplets of the expert, with the shares of all added."""
    delta = random_deltas(1, 30, 24)[0]
    merged = merge_matrices("tsv_m", torch.stack([delta] * 3))
    U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    assert error(merged, (U[:, :8] * S[:8]) @ Vh[:8]) <= 1e-5


def test_more_experts_than_rank_gives_zero():
    assert kept_per_expert(3, None, 5) == 0
    assert torch.equal(merge_matrices("tsv_m", random_deltas(5, 3, 7)), torch.zeros(3, 7))


def test_plan_of_more_experts_than_rank_promises_no_work():
    entry = get_method("tsv_m")
    assert entry.explain is not None
    sentence = entry.explain((5, 3, 7), entry.parse({}), "fast")
    assert "more experts than rank" in sentence and "SVD" not in sentence
    assert "each expert: 1 of 3" in entry.explain((3, 3, 7), entry.parse({}), "fast")


def test_seed_and_tensor_name_change_nothing_but_rounding(monkeypatch):
    """k = 8 of 512 is what block Krylov is for: the only route that starts from the seed."""
    krylov, found = leading._krylov, []
    monkeypatch.setattr(leading, "_krylov", lambda *a: found.append(krylov(*a)) or found[-1])
    columns = 1 / torch.arange(1, 513.0)
    deltas = random_deltas(2, 520, 512) * columns
    how = {"rank_fraction": 8 / 512}
    first = merge_matrices("tsv_m", deltas, tensor="a", seed=1, **how)
    again = merge_matrices("tsv_m", deltas, tensor="a", seed=1, **how)
    seed = merge_matrices("tsv_m", deltas, tensor="a", seed=2, **how)
    name = merge_matrices("tsv_m", deltas, tensor="b", seed=1, **how)
    assert len(found) == 8 and all(pairs is not None for pairs in found)
    assert torch.equal(first, again)
    for other in (seed, name):
        assert not torch.equal(first, other)
        assert error(other, first) <= 1e-5
    assert error(first, textbook(deltas, 8)) <= 1e-4


def test_thread_count_does_not_matter():
    deltas = random_deltas(3, 150, 130)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(merge_matrices("tsv_m", deltas))
    finally:
        torch.set_num_threads(before)
    assert error(*results) <= 1e-6


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_bad_fraction(fraction):
    with pytest.raises(MethodError, match="rank_fraction"):
        merge_matrices("tsv_m", random_deltas(2, 4, 4), rank_fraction=fraction)
