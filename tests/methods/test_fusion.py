"""Guards nearswap and arcee_fusion, the methods of a base and one expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eutectic.methods import merge_matrices

GENERATOR = torch.Generator().manual_seed(9)
BASE = torch.randn(7, 11, generator=GENERATOR, dtype=torch.float64)
DELTA = 0.2 * torch.randn(7, 11, generator=GENERATOR, dtype=torch.float64)


def naive_fusion(base: Tensor, weight: Tensor) -> Tensor:
    """Return the fused weight; rows are those of the last dimension."""
    rows, own = base.reshape(-1, base.shape[-1]), weight.reshape(-1, base.shape[-1])
    scores = []
    for a, b in zip(rows, own, strict=True):
        p, q = b.exp() / b.exp().sum() + 1e-8, a.exp() / a.exp().sum() + 1e-8
        divergence = float((p * (p.log() - q.log())).sum())
        scores.append((b - a).abs() * divergence)
    flat = torch.cat(scores)
    ordered = sorted(flat.tolist())
    last = len(ordered) - 1
    first, median, third = (ordered[int(q * last)] for q in (0.25, 0.5, 0.75))
    kept = flat >= median + 1.5 * (third - first)
    return torch.where(kept.view_as(base), weight, base)


@pytest.mark.parametrize("shape", [(7, 11), (77,), (1, 77), (77, 1), (7, 11, 1)])
def test_fusion(shape):
    base, delta = BASE.view(shape), DELTA.view(shape)
    merged = merge_matrices("arcee_fusion", delta[None], base=base)
    assert torch.allclose(base + merged, naive_fusion(base, base + delta), rtol=1e-12)


def test_fusion_takes_a_part():
    merged = merge_matrices("arcee_fusion", DELTA[None], base=BASE)
    share = float((merged != 0).double().mean())
    assert 0.02 < share < 0.4
    held = merged.abs() > 1e-12
    assert torch.allclose(merged[held], DELTA[held], rtol=1e-9)


def test_fusion_weight_is_how_much_is_let_in():
    whole = merge_matrices("arcee_fusion", DELTA[None], base=BASE)
    half = merge_matrices("arcee_fusion", DELTA[None], base=BASE, weights=(0.5,))
    assert torch.allclose(half, whole / 2, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("t", [0.0, 0.01, 0.1, 10.0])
def test_nearswap(t):
    merged = merge_matrices("nearswap", DELTA[None], t=t)
    share = (t / DELTA.abs()).clamp(0, 1)
    expected = share * (BASE + DELTA) + (1 - share) * BASE
    assert torch.allclose(BASE + merged, expected, rtol=1e-12)
    assert float(merged.abs().max()) <= t
