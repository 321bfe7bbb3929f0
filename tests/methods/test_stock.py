"""Guards Model Stock against its formula, and where there is no estimate."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from eutectic.errors import MethodError
from eutectic.methods import merge_matrices

GENERATOR = torch.Generator().manual_seed(8)
COMMON = torch.randn(5, 9, generator=GENERATOR, dtype=torch.float64)
DELTAS = COMMON + torch.randn(4, 5, 9, generator=GENERATOR, dtype=torch.float64)


def naive(vectors: Tensor) -> Tensor:
    """The merged vector of `[T, n]`, equal weights."""
    count = len(vectors)
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in itertools.combinations(vectors, 2)]
    cosine = sum(cosines) / len(cosines)
    return count * cosine / (1 + (count - 1) * cosine) * vectors.mean(0)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_one_ratio_for_the_tensor(count):
    merged = merge_matrices("model_stock", DELTAS[:count])
    expected = naive(DELTAS[:count].flatten(1)).view(5, 9)
    assert torch.allclose(merged, expected, rtol=1e-12)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_one_ratio_for_each_row(count):
    merged = merge_matrices("model_stock", DELTAS[:count], filter_wise=True)
    expected = torch.stack([naive(DELTAS[:count, row]) for row in range(5)])
    assert torch.allclose(merged, expected, rtol=1e-12)


def test_a_vector_is_one_row():
    flat = DELTAS.flatten(1)
    merged = merge_matrices("model_stock", flat, filter_wise=True)
    assert torch.allclose(merged, naive(flat), rtol=1e-12)


def test_the_optimum_of_the_paper_for_two():
    a, b = DELTAS[:2].flatten(1)
    cosine = a @ b / (a.norm() * b.norm())
    merged = merge_matrices("model_stock", DELTAS[:2]).flatten()
    assert torch.allclose(merged, 2 * cosine / (1 + cosine) * (a + b) / 2, rtol=1e-12)


def test_opposite_and_zero_deltas_keep_the_base():
    assert not merge_matrices("model_stock", torch.stack([COMMON, -COMMON])).any()
    assert not merge_matrices("model_stock", torch.stack([COMMON, 0 * COMMON])).any()


def test_negligible_norms_make_deltas_less_alike():
    small = 1e-4 * DELTAS[:2]
    a, b = small.flatten(1)
    cosine = a @ b / 1e-4
    merged = merge_matrices("model_stock", small, negligible=1e-4).flatten()
    assert float(a.norm() * b.norm()) < 1e-4
    assert torch.allclose(merged, 2 * cosine / (1 + cosine) * (a + b) / 2, rtol=1e-12)


def test_one_expert_is_too_few():
    with pytest.raises(MethodError, match="at least 2 experts, got 1"):
        merge_matrices("model_stock", DELTAS[:1])
