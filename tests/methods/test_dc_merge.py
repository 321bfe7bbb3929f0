"""Guards DC-Merge against a transcription with plain decompositions."""

from __future__ import annotations

import pytest
import torch

from eutectic.methods import get_method, merge_matrices

DELTAS = torch.randn(3, 24, 15, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def naive(deltas, density, smoothing, fraction, weights):
    rank = min(deltas.shape[1:])
    k = rank // len(deltas) if fraction is None else max(1, int(fraction * rank))
    parts = []
    for delta, w in zip(deltas, weights, strict=True):
        U, S, Vh = torch.linalg.svd(w * delta, full_matrices=False)
        S = S[:k].clone()
        if smoothing == "mean":
            S[:] = S.mean()
        if smoothing == "linear":
            S = S.sum() * torch.arange(k, 0, -1) / (k * (k + 1) / 2)
        parts.append((U[:, :k], S, Vh[:k]))

    def nearest(columns):
        P, _, Qh = torch.linalg.svd(torch.cat(columns, 1), full_matrices=False)
        return P @ Qh

    U, V = nearest([p[0] for p in parts]), nearest([p[2].T for p in parts])
    cores = [U.T @ (u * s) @ vh @ V for u, s, vh in parts]
    kept = []
    for core in cores:
        count = max(int(density * core.numel()), k)
        bound = core.abs().flatten().sort(descending=True).values[count - 1] if count else 1e99
        kept.append(torch.where(core.abs() >= bound, core, 0))
    size = k * len(deltas)
    merged = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            column = [float(c[i, j]) for c in kept]
            agree = [c for c in column if c * sum(column) > 0]
            if i // k == j // k and agree:
                merged[i, j] = sum(agree) / len(agree)
    return U @ merged @ V.T


@pytest.mark.parametrize("fraction", [None, 0.2])
@pytest.mark.parametrize("smoothing", ["none", "mean", "linear"])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_against_the_transcription(density, smoothing, fraction):
    weights = [1.0, 0.5, 2.0]
    merged = merge_matrices(
        "dc_merge",
        DELTAS,
        weights=weights,
        density=density,
        smoothing=smoothing,
        rank_fraction=fraction,
    )
    expected = naive(DELTAS, density, smoothing, fraction, weights)
    assert float((merged - expected).norm() / expected.norm()) < 1e-9


def test_orthogonal_experts_keep_their_leading_parts():
    deltas = torch.zeros(2, 6, 6)
    deltas[0, :3, :3] = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    deltas[1, 3:, 3:] = torch.diag(torch.tensor([6.0, 5.0, 4.0]))
    merged = merge_matrices("dc_merge", deltas, density=1.0)
    assert torch.allclose(merged, deltas.sum(0), atol=1e-5)


def test_more_experts_than_rank_give_zero():
    assert not merge_matrices("dc_merge", torch.randn(5, 4, 4)).any()


def test_rounding_in_the_blocks_of_others_has_no_vote():
    generator = torch.Generator().manual_seed(3)
    Q, P = (torch.linalg.qr(torch.randn(12, 12, generator=generator))[0] for _ in range(2))
    S = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.5, 1.0])
    deltas = torch.stack([(Q[:, :6] * S) @ P[:6], (Q[:, 6:] * 2 * S) @ P[6:]])
    merged = merge_matrices("dc_merge", deltas, density=1.0)
    assert float((merged - deltas.sum(0)).norm() / deltas.sum(0).norm()) < 1e-5


@pytest.mark.parametrize("smoothing", ["none", "mean", "linear"])
def test_an_adapter_holds_what_it_makes_of_adapters(smoothing: str):
    # Its directions are the experts' own, so that no more of them are needed.
    deltas = torch.randn(3, 20, 2).double() @ torch.randn(3, 2, 16).double()
    merged = merge_matrices("dc_merge", deltas, smoothing=smoothing, density=0.5)
    left = torch.linalg.svd(torch.cat(list(deltas), 1)).U[:, :6]
    right = torch.linalg.svd(torch.cat(list(deltas), 0)).Vh[:6]
    assert torch.allclose(left @ (left.T @ merged), merged, atol=1e-9)
    assert torch.allclose(merged @ right.T @ right, merged, atol=1e-9)
    assert get_method("dc_merge").keeps_span
