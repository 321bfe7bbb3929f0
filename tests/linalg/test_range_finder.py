"""Guards that thin factors keep what they say they keep, and lose no more than the best would."""

import pytest
import torch
from torch import Tensor

from eutectic.linalg.lowrank import LowRank
from eutectic.linalg.range_finder import compressed


def with_spectrum(
    values: Tensor, out: int, width: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(out, len(values), generator=generator, dtype=torch.float64))
    right = torch.linalg.qr(
        torch.randn(width, len(values), generator=generator, dtype=torch.float64)
    )
    return (left[0] * values @ right[0].mT).to(dtype)


SPECTRA = {
    "flat": torch.ones(120),
    "slow": 1 / torch.arange(1.0, 121) ** 0.5,
    "steep": 0.8 ** torch.arange(120.0),
    "step": torch.cat([torch.full((20,), 3.0), torch.full((100,), 0.1)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(300, 120), (120, 300), (200, 200)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_rank_is_as_good_as_the_svd(
    spectrum: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = with_spectrum(SPECTRA[spectrum].double(), *shape, dtype)
    wide = matrix.double()
    values = torch.linalg.svdvals(wide)
    for rank in (1, 8, 20, 60):
        found = compressed(matrix, rank=rank, seed=1)
        assert found.rank == rank
        error = float(torch.linalg.vector_norm(wide - found.left @ found.right)) ** 2
        least = float((values[rank:] ** 2).sum())
        total = float((values**2).sum())
        assert error <= 1.01 * least + 1e-10 * total
        assert found.lost == pytest.approx(error / total, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_energy_takes_the_fewest_directions(spectrum: str) -> None:
    matrix = with_spectrum(SPECTRA[spectrum].double(), 400, 300)
    shares = torch.linalg.svdvals(matrix) ** 2
    for energy in (0.2, 0.9, 0.999):
        found = compressed(matrix, energy=energy)
        reached = shares.cumsum(0) / shares.sum() >= energy * (1 - 1e-12)
        fewest = int(reached.int().argmax()) + 1
        assert fewest <= found.rank <= fewest + 1
        assert found.lost <= 1 - energy + 1e-9
    whole = compressed(matrix, energy=1.0)
    assert whole.lost < 1e-12
    torch.testing.assert_close(whole.left @ whole.right, matrix, rtol=0, atol=1e-5)


def test_energy_is_kept_as_far_as_the_rank_allows() -> None:
    matrix = with_spectrum(torch.ones(40, dtype=torch.float64), 64, 64)
    found = compressed(matrix, rank=10, energy=0.9)
    assert found.rank == 10
    assert found.lost == pytest.approx(0.75, rel=1e-6)


def test_what_has_fewer_directions_gets_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(80, 3, generator=generator)
    product = left @ torch.randn(3, 90, generator=generator)
    for matrix in (product, LowRank(left, torch.linalg.lstsq(left, product).solution)):
        found = compressed(matrix, rank=16)
        assert found.rank == 3
        assert found.lost < 1e-9
        torch.testing.assert_close(
            (found.left @ found.right).float(), product, rtol=1e-4, atol=1e-5
        )


def test_edges() -> None:
    assert compressed(torch.zeros(5, 7), rank=3).rank == 0
    assert compressed(torch.zeros(5, 7), energy=0.9).lost == 0
    assert compressed(torch.zeros(0, 7), rank=3).rank == 0
    tiny = compressed(torch.full((40, 30), 1e-30), rank=2)
    assert tiny.rank == 1
    torch.testing.assert_close((tiny.left @ tiny.right).float(), torch.full((40, 30), 1e-30))
    with pytest.raises(ValueError, match="how many"):
        compressed(torch.ones(2, 2))


def test_factors_stay_thin_and_seeds_repeat() -> None:
    generator = torch.Generator().manual_seed(0)
    pair = LowRank(
        torch.randn(500, 12, generator=generator), torch.randn(12, 400, generator=generator)
    )
    cut = compressed(pair, rank=4)
    whole = compressed(pair.dense(), rank=4)
    assert cut.lost == pytest.approx(whole.lost, rel=1e-5)
    again = compressed(pair.dense(), rank=4)
    assert torch.equal(again.left, whole.left)


@pytest.mark.parametrize("shape", [(218, 197), (139, 189), (98, 209)])
def test_nearly_flat_spectra_lose_no_more_than_is_said(shape: tuple[int, int]) -> None:
    """Where power steps gain least, and so end early."""
    side = min(shape)
    torch.manual_seed(side)
    U, V = (torch.linalg.qr(torch.randn(n, side)).Q for n in shape)
    values = (1 + torch.arange(side)) ** -0.05
    matrix = (U * values) @ V.mT
    found = compressed(matrix, rank=side // 6)
    exact = torch.linalg.svdvals(matrix.double()).square()
    assert found.lost <= 1.03 * float(exact[side // 6 :].sum() / exact.sum())
