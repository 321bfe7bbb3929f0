"""The default tolerance keeps what is a direction and drops what is rounding."""

import pytest
import torch

from eutectic.linalg.polar import polar
from eutectic.linalg.svd import default_tolerance, numerical_rank


@pytest.mark.parametrize("share", [None, 0.1, 0.001])
def test_sums_of_adapters_have_their_rank(share: float | None):
    """As products of factors, and as what full float32 checkpoints differ by."""
    generator = torch.Generator().manual_seed(0)
    side, rank, experts = 400, 8, 4
    left = torch.randn(experts, side, rank, generator=generator)
    deltas = left @ torch.randn(experts, rank, side, generator=generator)
    if share is not None:
        base = torch.randn(side, side, generator=generator)
        scale = share * float(base.norm() / deltas[0].norm())
        deltas = (base + scale * deltas) - base
    total = deltas.sum(0)
    S = torch.linalg.svdvals(total.double())
    assert numerical_rank(S, default_tolerance(torch.float32, total.shape)) == rank * experts
    assert polar(total).rank == rank * experts


def test_directions_of_a_wide_sum_are_kept():
    """A direction at 3e-5 of the first: the textbook's eps · side takes it for rounding."""
    side = 512
    generator = torch.Generator().manual_seed(1)
    U, V = (
        torch.linalg.qr(torch.randn(side, side, generator=generator).double()).Q for _ in range(2)
    )
    sizes = torch.logspace(0, -4.5, side, dtype=torch.float64)
    total = ((U * sizes) @ V.mT).float()
    eps = torch.finfo(torch.float32).eps
    assert float(sizes[-1]) < eps * side
    assert polar(total).rank == side
    factor = polar(total).factor.double()
    assert float((factor - U @ V.mT).norm() / side**0.5) < 5e-3


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2**-23), (torch.float64, 2**-52)])
def test_the_bound(dtype: torch.dtype, eps: float):
    assert default_tolerance(dtype, (20, 40)) == 40 * eps
    assert default_tolerance(dtype, (4096, 40)) == 128 * eps
    assert default_tolerance(torch.bfloat16, (8, 8)) == 8 * 2**-23
