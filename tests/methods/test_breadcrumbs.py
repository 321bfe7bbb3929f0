"""Guards Model Breadcrumbs against sorting, and tensors too small for its fractions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eutectic.methods import get_method, merge_matrices
from eutectic.methods.matrices import run_method
from eutectic.methods.registry import Context

DELTAS = torch.randn(3, 8, 25, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
W = (0.5, 1.25, -0.25)


def naive_kept(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Keep int(density·n) entries after the int(γ·n) largest, as far as there is room."""
    if density == 1:
        return delta
    flat = delta.flatten()
    n = len(flat)
    kept = int(density * n)
    dropped = min(int(gamma * n), n - kept)
    order = flat.abs().argsort(descending=True)
    out = torch.zeros_like(flat)
    chosen = order[dropped : dropped + kept]
    out[chosen] = flat[chosen]
    return out.view_as(delta)


@settings(deadline=None, max_examples=40)
@given(
    density=st.floats(0, 1),
    gamma=st.floats(0, 1),
    rows=st.integers(1, 8),
    columns=st.integers(1, 25),
)
def test_what_is_kept(density, gamma, rows, columns):
    delta = DELTAS[:1, :rows, :columns]
    merged = merge_matrices("breadcrumbs", delta, density=density, gamma=gamma)
    assert torch.equal(merged, naive_kept(delta[0], density, gamma))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weighted_sum(dtype):
    merged = merge_matrices("breadcrumbs", DELTAS.to(dtype), weights=W, density=0.4, gamma=0.1)
    kept = [naive_kept(d, 0.4, 0.1) for d in DELTAS.to(dtype)]
    expected = sum(w * k for w, k in zip(W, kept, strict=True))
    assert torch.allclose(merged, expected, rtol=1e-6)


def test_rescaling_keeps_the_sum_of_magnitudes():
    for delta in DELTAS:
        merged = merge_matrices("breadcrumbs", delta[None], density=0.3, rescale="l1")
        assert float(merged.abs().sum()) == pytest.approx(float(delta.abs().sum()))


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
def test_the_sign_consensus(aggregate):
    merged = merge_matrices(
        "breadcrumbs_ties", DELTAS, weights=W, density=0.7, gamma=0.1, aggregate=aggregate
    )
    kept = torch.stack([naive_kept(d, 0.7, 0.1) for d in DELTAS]).flatten(1)
    for place, value in enumerate(merged.flatten().tolist()):
        votes = [w * float(k) for w, k in zip(W, kept[:, place], strict=True)]
        sign = 1 if sum(votes) >= 0 else -1
        agree = [t for t in range(3) if votes[t] * sign > 0]
        share = sum(W[t] for t in agree) if aggregate == "mean" else 1.0
        assert value == pytest.approx(sum(votes[t] for t in agree) / (share or 1.0), rel=1e-12)


def test_equal_magnitudes_stay_together():
    merged = merge_matrices("breadcrumbs", torch.ones(1, 4, 5), density=0.5, gamma=0.2)
    assert torch.equal(merged, torch.ones(4, 5))


def test_an_expert_has_fractions_of_its_own():
    method = get_method("breadcrumbs")
    common, own = method.parse({"density": 0.5}), method.parse({"density": 0.2, "gamma": 0.3})
    context = Context(weights=(1.0, 1.0), experts=("a", "b"), own=(None, own))
    merged = run_method(method, DELTAS[:2], common, context).delta
    expected = naive_kept(DELTAS[0], 0.5, 0.01) + naive_kept(DELTAS[1], 0.2, 0.3)
    assert torch.allclose(merged, expected, rtol=1e-12)
