"""Bases of tall factors: orthonormal, spanning them, by Householder where Cholesky is unsound."""

import pytest
import torch

from eutectic.linalg.lowrank import LowRank
from eutectic.linalg.polar import polar
from eutectic.linalg.thin_basis import ThinBasis, thin_basis


def factor(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Return a factor whose columns fall off by four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) * torch.logspace(0, -4, k)


def check(found: ThinBasis, columns: torch.Tensor) -> None:
    basis = found.basis()
    one = torch.eye(basis.shape[1], dtype=torch.float64)
    torch.testing.assert_close(basis.mT @ basis, one, rtol=0, atol=1e-9)
    again = basis @ found.triangle
    torch.testing.assert_close(again, columns.double(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.times(None, torch.float32), basis.float(), rtol=0, atol=1e-6)
    small = torch.randn(basis.shape[1], 3, dtype=torch.float64)
    own = found.times(small, torch.float32)
    assert own.dtype == torch.float32
    torch.testing.assert_close(own.double(), basis @ small, rtol=0, atol=1e-5)


def test_independent_columns_go_by_cholesky() -> None:
    columns = factor(200, 40)
    found = thin_basis(columns)
    assert found.inverse is not None
    check(found, columns)


@pytest.mark.parametrize("n", [200, 30, 40])
def test_dependent_or_too_many_columns_go_by_householder(n: int) -> None:
    columns = factor(n, 40)
    columns[:, 7] = columns[:, 2] + 1e-4 * columns[:, 3]
    found = thin_basis(columns)
    assert found.inverse is None
    check(found, columns)


def test_a_zero_column_none_and_float64_go_by_householder() -> None:
    columns = factor(60, 5)
    columns[:, 3] = 0
    for own in (columns, columns[:, :0], factor(60, 5).double(), torch.zeros(60, 5)):
        found = thin_basis(own)
        assert found.inverse is None
        check(found, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_polar_factor_of_thin_factors_of_any_size(dtype: torch.dtype, scale: float) -> None:
    left, right = factor(90, 12).to(dtype), factor(70, 12, 1).mT.to(dtype)
    if dtype == torch.float32:
        left = left * scale
    exact = LowRank(left.double(), right.double())
    U, S, Vh = torch.linalg.svd(exact.dense() / left.double().norm(), full_matrices=False)
    kept = int((S > 1e-5 * S[0]).sum())
    found = polar(LowRank(left, right), rank_tolerance=1e-5)
    assert found.rank == kept
    product = found.factor.left.double() @ found.factor.right.double()
    own = U[:, :kept] @ Vh[:kept]
    assert float((product - own).norm() / own.norm()) < (1e-5 if dtype == torch.float32 else 2e-3)
