"""Guards the bases that matrices share: energy, optimality, and what they do not depend on."""

import pytest
import torch
from torch import Tensor

from eutectic.linalg.lowrank import LowRankStack
from eutectic.linalg.shared import SharedSpace, shared_space

TOLERANCE = 1e-10


def stack(count: int = 3, shape: tuple[int, int] = (20, 14), seed: int = 0) -> LowRankStack:
    """Return products of rank 2, 3, …, with decaying singular values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    ranks = [t + 2 for t in range(count)]
    left = tuple(draw(shape[0], r) * 0.6 ** torch.arange(r) for r in ranks)
    return LowRankStack(left, tuple(draw(r, shape[1]) for r in ranks))


def shared(deltas: Tensor | LowRankStack, rank: int, weights: list[float] | None = None):
    own = weights or [1.0] * len(deltas)
    return shared_space(deltas, rank, weights=own, tolerance=TOLERANCE)


def expanded(found: SharedSpace) -> Tensor:
    space = found.space
    return torch.stack([space.expand(core).dense() for core in space.cores])


def energy(matrices: Tensor, P: Tensor, Q: Tensor) -> float:
    return float((P.mT @ matrices @ Q).square().sum())


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_bases_are_orthonormal_and_lose_what_they_say(rank: int) -> None:
    deltas = stack()
    dense = deltas.dense()
    for given in (deltas, dense):
        found = shared(given, rank)
        P, Q = found.space.left, found.space.right
        assert P.shape[1] == Q.shape[1] == rank
        torch.testing.assert_close(P.mT @ P, torch.eye(rank, dtype=P.dtype))
        torch.testing.assert_close(Q.mT @ Q, torch.eye(rank, dtype=Q.dtype))
        torch.testing.assert_close(found.space.cores, P.mT @ dense @ Q)
        lost = float((dense - expanded(found)).square().sum() / dense.square().sum())
        assert found.lost == pytest.approx(lost, abs=1e-12)


def test_no_basis_near_by_keeps_more() -> None:
    """A stationary point: turning either basis a little gains nothing; truncations lose more."""
    dense = stack().dense()
    found = shared(dense, 3)
    P, Q = found.space.left, found.space.right
    best = energy(dense, P, Q)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        near = [
            torch.linalg.qr(b + 0.02 * torch.randn(b.shape, generator=generator, dtype=b.dtype))[0]
            for b in (P, Q)
        ]
        assert energy(dense, near[0], Q) <= best * (1 + 1e-4)
        assert energy(dense, P, near[1]) <= best * (1 + 1e-4)
    U = torch.linalg.svd(torch.cat(list(dense), 1))[0][:, :3]
    V = torch.linalg.svd(torch.cat(list(dense.mT), 1))[0][:, :3]
    assert energy(dense, U, V) <= best


def test_one_matrix_gives_its_truncated_svd() -> None:
    deltas = LowRankStack(stack().left[2:], stack().right[2:])
    U, S, Vh = torch.linalg.svd(deltas.dense()[0])
    wanted = (U[:, :2] * S[:2]) @ Vh[:2]
    found = shared(deltas, 2)
    torch.testing.assert_close(expanded(found)[0], wanted)
    assert found.lost == pytest.approx(float(1 - S[:2].square().sum() / S.square().sum()))


def test_thin_is_dense_and_nothing_is_lost_at_the_full_rank() -> None:
    deltas = stack()
    for rank in (4, 9, 14, 50):
        thin, dense = shared(deltas, rank), shared(deltas.dense(), rank)
        torch.testing.assert_close(expanded(thin), expanded(dense), rtol=1e-6, atol=1e-9)
        if rank >= deltas.rank:
            assert thin.lost == 0
            assert thin.space.cores.shape[1:] == (9, 9)
            torch.testing.assert_close(expanded(thin), deltas.dense())


def test_other_orders_bases_and_factors_change_nothing() -> None:
    deltas = stack()
    wanted = expanded(shared(deltas, 4, [1, 0.5, -2]))
    turned = LowRankStack(deltas.left[::-1], deltas.right[::-1])
    torch.testing.assert_close(expanded(shared(turned, 4, [-2, 0.5, 1])).flip(0), wanted)
    A = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    B = torch.linalg.qr(torch.randn(14, 14, dtype=torch.float64))[0]
    rotated = expanded(shared(A @ deltas.dense() @ B, 4, [1, 0.5, -2]))
    torch.testing.assert_close(rotated, A @ wanted @ B)
    mixed = [torch.randn(f.shape[1], f.shape[1], dtype=torch.float64) for f in deltas.left]
    other = LowRankStack(
        tuple(f @ m for f, m in zip(deltas.left, mixed, strict=True)),
        tuple(torch.linalg.solve(m, f.double()) for f, m in zip(deltas.right, mixed, strict=True)),
    )
    torch.testing.assert_close(expanded(shared(other, 4, [1, 0.5, -2])), wanted)


def test_weights_of_zero_have_no_say_and_copies_take_no_room() -> None:
    deltas = stack()
    two = LowRankStack(deltas.left[:2], deltas.right[:2])
    found = expanded(shared(deltas, 3, [1, 1, 0]))[:2]
    torch.testing.assert_close(found, expanded(shared(two, 3)))
    twice = LowRankStack(two.left * 2, two.right * 2)
    copies = shared(twice, 9)
    assert copies.space.cores.shape[1:] == (5, 5)
    torch.testing.assert_close(expanded(copies), twice.dense())


def test_zeros_have_no_directions() -> None:
    for given in (torch.zeros(2, 5, 4), LowRankStack((torch.zeros(5, 2),), (torch.zeros(2, 4),))):
        found = shared(given, 3)
        assert found.space.cores.numel() == 0
        assert found.lost == 0
    empty = LowRankStack((torch.zeros(5, 0),), (torch.zeros(0, 4),))
    assert shared(empty, 3).space.left.shape == (5, 0)


# Shares of each matrix's energy that the bases keep, the first row and the norm of ΣP·core·Qᵀ. By
# the formulas of CtM's authors (github.com/ZhengbaoHe/compress-then-merge: all matrices scaled to
# β·norm + (1 − β)·mean norm, partial Tucker decomposition, cores of the matrices as they are),
# computed with tensorly 0.10 to a tolerance of 1e-15.
AUTHORS = {
    0.0: (
        [0.4779638, 0.5019933, 0.3376352],
        [-0.5227866, 1.0452618, 3.7025543, 1.3336556, 0.1297110],
        14.6352399,
    ),
    0.5: (
        [0.1022780, 0.7736707, 0.2521049],
        [-0.1010563, -1.1929134, 1.2124010, 0.3016274, -0.3835907],
        16.9530080,
    ),
    1.0: (
        [0.0973872, 0.7744820, 0.2508200],
        [-0.0560467, -1.0921087, 1.1175380, 0.2222129, -0.3690917],
        16.9324899,
    ),
}


@pytest.mark.parametrize("beta", AUTHORS)
def test_balanced_as_the_authors_of_compress_then_merge_do(beta: float) -> None:
    size = (torch.arange(n, dtype=torch.float64) for n in (3, 7, 5))
    t, i, j = torch.meshgrid(*size, indexing="ij")
    dense = torch.cos(1.3 * i * (j + 1) + t) + 0.3 * torch.sin((t + 1) * i - 2 * j)
    dense = dense * torch.tensor([1, 4, 0.25], dtype=torch.float64)[:, None, None]
    how = {"weights": [1.0] * 3, "tolerance": TOLERANCE, "balance": 1 - beta}
    found = shared_space(dense, 2, **how)
    shares, row, norm = AUTHORS[beta]
    kept = found.space.cores.square().sum((1, 2)) / dense.square().sum((1, 2))
    # Steps end where the energy gains no more than 1e-9, or after thirty.
    torch.testing.assert_close(kept, torch.tensor(shares, dtype=kept.dtype), rtol=0, atol=5e-4)
    merged = found.space.expand(found.space.cores.sum(0)).dense()
    wanted = torch.tensor(row, dtype=merged.dtype)
    torch.testing.assert_close(merged[0], wanted, rtol=0, atol=0.02)
    assert float(merged.norm()) == pytest.approx(norm, rel=1e-3)
    lost = float((dense - expanded(found)).square().sum() / dense.square().sum())
    assert found.lost == pytest.approx(lost, abs=1e-12)


def test_balanced_bases_do_not_depend_on_the_sizes_of_experts() -> None:
    deltas = stack()
    larger = LowRankStack(
        tuple(f * s for f, s in zip(deltas.left, (1, 50, 0.1), strict=True)), deltas.right
    )
    how = {"weights": [1.0] * 3, "tolerance": TOLERANCE, "balance": 1.0}
    plain, scaled = shared_space(deltas, 3, **how), shared_space(larger, 3, **how)
    for side in ("left", "right"):
        one, other = (getattr(found.space, side) for found in (plain, scaled))
        torch.testing.assert_close(one @ one.mT, other @ other.mT)
    norms = deltas.dense().flatten(1).norm(dim=1)
    alike = LowRankStack(
        tuple(f / n for f, n in zip(deltas.left, norms, strict=True)), deltas.right
    )
    left = shared(alike, 3).space.left
    torch.testing.assert_close(left @ left.mT, plain.space.left @ plain.space.left.mT)
    # Of equal norms nothing is changed; half way is neither.
    same = shared_space(alike, 3, **{**how, "balance": 0.5}).space.left
    torch.testing.assert_close(left @ left.mT, same @ same.mT)
    half = shared_space(larger, 3, **{**how, "balance": 0.5}).space.left
    none = shared_space(larger, 3, **{**how, "balance": 0.0}).space.left
    assert not torch.allclose(half @ half.mT, none @ none.mT, atol=1e-6)


def test_balance_hears_nobody_of_weight_or_change_zero() -> None:
    deltas = stack()
    two = LowRankStack(deltas.left[:2], deltas.right[:2])
    wanted = shared_space(two, 3, weights=[1, 1], tolerance=TOLERANCE, balance=0.7)
    silent = shared_space(deltas, 3, weights=[1, 1, 0], tolerance=TOLERANCE, balance=0.7)
    dense = torch.cat([two.dense(), torch.zeros(1, 20, 14, dtype=torch.float64)])
    zero = shared_space(dense, 3, weights=[1, 1, 1], tolerance=TOLERANCE, balance=0.7)
    for found in (silent, zero):
        torch.testing.assert_close(expanded(found)[:2], expanded(wanted), rtol=1e-4, atol=1e-4)
        assert found.lost == pytest.approx(wanted.lost, abs=1e-6)
    nothing = shared_space(torch.zeros(2, 5, 4), 3, weights=[1, 1], tolerance=1e-9, balance=1.0)
    assert nothing.space.cores.numel() == 0
