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
