"""Inverses of matrices in few rows and a diagonal, against dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eutectic.errors import NumericalError
from eutectic.linalg.gram import ridged_cholesky
from eutectic.linalg.rows_and_diagonal import RidgedInverse, invert, ridged_inverse, times_without

EPS = torch.finfo(torch.float32).eps
N, K, BARE = 40, 12, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dense(rows: Tensor, diagonal: Tensor) -> Tensor:
    return rows.T @ rows + diagonal.diag()


def ridged(rows: Tensor, diagonal: Tensor, ridge: float = 0.0) -> RidgedInverse:
    return ridged_inverse(rows, diagonal, ridge=ridge, unit_roundoff=EPS)


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


CASES = {
    "everywhere": drawn(N, seed=1).abs() + 0.1,
    "tiny": 1e-9 * (drawn(N, seed=1).abs() + 0.1) * (torch.arange(N) < BARE)
    + (torch.arange(N) >= BARE),
    "zeros": (torch.arange(N) >= BARE).double(),
    "one zero": (torch.arange(N) != 7).double(),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_inverse_is_that_of_the_matrix(case: str, scale: float) -> None:
    rows, diagonal = scale * drawn(K, N), CASES[case]
    found = ridged(rows, diagonal)
    assert (found.ridge, found.escalated, found.dead) == (0.0, False, 0)
    right = drawn(5, N, seed=2)
    near(found.inverse.times(right) @ dense(rows, diagonal), right, 1e-7)


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_the_ridge_grows_as_it_does_for_the_matrix(ridge: float) -> None:
    """Rows alone leave directions without anything; so do more bare inputs than rows."""
    cases = [
        (drawn(K, N), torch.zeros(N)),
        (drawn(K, N) * torch.logspace(0, -6, N), torch.zeros(N)),
        (drawn(K, N), (torch.arange(N) >= K + 3).double()),
    ]
    for rows, diagonal in cases:
        found = ridged(rows, diagonal.double(), ridge)
        whole = dense(rows, diagonal.double())
        expected = ridged_cholesky(whole, ridge=ridge, unit_roundoff=EPS)
        assert (found.ridge, found.escalated) == (expected.ridge, expected.escalated)
        right = drawn(5, N, seed=2)
        near(found.inverse.times(right), torch.cholesky_solve(right.T, expected.factor).T, 1e-8)


def test_inputs_that_are_never_active_are_set_aside() -> None:
    rows, diagonal = drawn(K, N), torch.ones(N, dtype=torch.float64)
    rows[:, :3] = 0
    diagonal[:3] = 0
    found = ridged(rows, diagonal)
    assert (found.dead, found.escalated) == (3, False)
    right = drawn(5, N, seed=2)
    right[:, :3] = 0
    solved = found.inverse.times(right)
    assert not bool(solved[:, :3].any())
    near(solved @ dense(rows, diagonal), right)


def test_no_rows_and_as_many_as_columns() -> None:
    diagonal = CASES["everywhere"]
    right = drawn(2, N, seed=2)
    near(ridged(drawn(0, N), diagonal).inverse.times(right), right / diagonal)
    rows = drawn(N, N)
    found = ridged(rows, torch.zeros(N, dtype=torch.float64))
    assert found.ridge == 0
    near(found.inverse.times(right) @ rows.T @ rows, right, 1e-7)


def test_rows_that_overflow_are_refused() -> None:
    with pytest.raises(NumericalError, match="cannot be inverted"):
        ridged(drawn(K, N) * 1e200, torch.ones(N, dtype=torch.float64))


def test_what_is_taken_off_again() -> None:
    rows, diagonal, right = drawn(K, N), CASES["everywhere"], drawn(5, N, seed=2)
    solved = invert(rows, diagonal, torch.empty(0, dtype=torch.long))
    assert solved is not None
    taken = 0.3 * drawn(2, K, seed=3) @ rows / K
    found = times_without(right, solved[0], taken)
    assert found is not None
    near(found @ (dense(rows, diagonal) - taken.T @ taken), right)
    assert times_without(right, solved[0], 100 * taken) is None
