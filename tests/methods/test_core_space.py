"""Guards that merges in shared bases are the same from thin factors and from expanded deltas."""

import pytest
import torch
from torch import Tensor

from eutectic.linalg.lowrank import LowRankStack
from eutectic.methods import merge_matrices

METHODS = [f"{space}_{inner}" for space in ("core", "knots") for inner in ("ties", "dare_ties")]


def adapters(shape: tuple[int, int] = (60, 80), ranks: tuple[int, ...] = (2, 4, 8)) -> LowRankStack:
    """Return factors whose singular values fall off."""
    generator = torch.Generator().manual_seed(0)
    left = tuple(
        torch.randn(shape[0], r, generator=generator) * 0.8 ** torch.arange(r) for r in ranks
    )
    return LowRankStack(left, tuple(torch.randn(r, shape[1], generator=generator) for r in ranks))


def widened(stack: LowRankStack) -> Tensor:
    return torch.stack([p.left.double() @ p.right.double() for p in stack])


@pytest.mark.parametrize("method", [*METHODS, "core_dare_linear", "knots_dare_linear"])
def test_thin_is_expanded(method: str) -> None:
    """Within float32 of the products in float64, whose order of entries rounding cannot change."""
    stack = adapters()
    thin = merge_matrices(method, stack).double()
    whole = merge_matrices(method, widened(stack))
    assert torch.linalg.vector_norm(thin - whole) < 1e-6 * torch.linalg.vector_norm(whole)


def test_what_rounding_changes_of_knots_ties_are_entries_at_a_threshold() -> None:
    """With rounding made large: only entries that stood at the bound or at a tie differ."""
    exact = widened(adapters())
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(exact.shape, generator=generator, dtype=exact.dtype)
    noise = noise * 1e-3 * exact.abs().mean()
    near = exact + noise
    U, S, _ = torch.linalg.svd(torch.cat(list(exact), 1), full_matrices=False)
    U = U[:, : int((S > 1e-9 * S[0]).sum())]

    def merged(deltas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return U·TIES(UᵀΔ_t), thresholds and entries, in one basis for both."""
        rows = U.mT @ deltas
        count = int(0.2 * rows[0].numel())
        bounds = rows.abs().flatten(1).topk(count).values[:, -1]
        return U.mT @ (U @ merge_matrices("ties", rows)), bounds, rows

    (one, bounds, rows), (two, _, other) = merged(exact), merged(near)
    torch.testing.assert_close(U @ one, merge_matrices("knots_ties", exact), rtol=1e-6, atol=1e-9)
    moved = float((rows - other).abs().max())
    apart = (one - two).abs() > 10 * moved
    assert apart.any()
    at_bound = (rows.abs() - bounds[:, None, None]).abs() < 4 * moved
    kept = torch.where(rows.abs() >= bounds[:, None, None], rows, 0)
    tied = kept.sum(0).abs() < 10 * moved
    assert bool((at_bound.any(0) | tied)[apart].all())
