"""The ridged Cholesky factor leaves sound Grams alone, and says what singular ones took."""

from __future__ import annotations

import pytest
import torch

from eutectic.errors import NumericalError
from eutectic.linalg.gram import OWN_NOISE, ridged_cholesky

EPS32 = torch.finfo(torch.float32).eps


def tokens(count: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, n, generator=generator, dtype=torch.float64)


def test_full_rank_takes_no_ridge():
    X = tokens(100, 12)
    result = ridged_cholesky(X.T @ X, ridge=0.0, unit_roundoff=EPS32)
    torch.testing.assert_close(result.factor @ result.factor.T, X.T @ X)
    assert (result.ridge, result.escalated, result.dead) == (0.0, False, 0)


def test_the_ridge_asked_for_is_relative_to_the_mean_diagonal():
    X = tokens(50, 6)
    A = X.T @ X
    result = ridged_cholesky(A, ridge=0.1, unit_roundoff=EPS32)
    expected = A + 0.1 * A.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(result.factor @ result.factor.T, expected)
    assert result.ridge == 0.1 and not result.escalated


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fewer_tokens_than_inputs_raise_the_ridge_just_above_rounding(dtype):
    X = tokens(7, 20)
    gram = (X.T @ X).to(dtype)
    eps = torch.finfo(dtype).eps
    result = ridged_cholesky(gram.double(), ridge=0.0, unit_roundoff=eps)
    assert result.escalated
    least = max(eps, OWN_NOISE)
    assert 20 * least <= result.ridge < 2001 * least
    assert bool(torch.isfinite(result.factor).all())


def test_inputs_that_are_never_active_ask_for_no_ridge():
    X = tokens(40, 8)
    X[:, 3] = 0
    result = ridged_cholesky(X.T @ X, ridge=0.0, unit_roundoff=EPS32)
    assert result.dead == 1 and result.ridge == 0.0
    solution = torch.cholesky_solve(X.T @ X, result.factor)
    torch.testing.assert_close(solution[3], torch.zeros(8, dtype=torch.float64))


def test_an_indefinite_matrix_is_refused_with_its_smallest_eigenvalue():
    matrix = torch.diag(torch.tensor([4.0, 1.0, -1.0], dtype=torch.float64))
    with pytest.raises(NumericalError, match="smallest eigenvalue is -1"):
        ridged_cholesky(matrix, ridge=0.0, unit_roundoff=EPS32)


def test_a_coarse_dtype_does_not_refuse_a_sound_matrix():
    X = tokens(300, 64)
    eps = torch.finfo(torch.bfloat16).eps
    assert ridged_cholesky(X.T @ X, ridge=0.0, unit_roundoff=eps).ridge == 0.0
