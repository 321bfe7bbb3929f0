"""Guards the means on a sphere against transcriptions that work on the vectors themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eutectic.errors import MethodError
from eutectic.methods import merge_matrices

GENERATOR = torch.Generator().manual_seed(1)
DELTAS = torch.randn(4, 5, 7, generator=GENERATOR, dtype=torch.float64)
BASE = torch.randn(5, 7, generator=GENERATOR, dtype=torch.float64)
W = (0.5, 1.25, 0.25, 2.0)


def naive_multislerp(vectors: Tensor, weights, normalize=True) -> Tensor:
    w = torch.tensor(weights, dtype=vectors.dtype)
    w = w / w.sum() if normalize else w
    flat = vectors.flatten(1)
    norms = flat.norm(dim=1)
    units = flat / norms[:, None]
    mean = (w[:, None] * units).sum(0)
    mean = mean / mean.norm()
    tangent = torch.zeros_like(mean)
    for unit, own in zip(units, w, strict=True):
        tangent += own * (unit - (unit @ mean) * mean)
    angle = tangent.norm()
    point = mean * angle.cos() + tangent / angle * angle.sin()
    return (point * (w * norms).sum()).view(vectors.shape[1:])


def naive_karcher(vectors: Tensor, weights, steps=200) -> Tensor:
    w = torch.tensor(weights, dtype=vectors.dtype)
    w = w / w.sum()
    flat = vectors.flatten(1)
    norms = flat.norm(dim=1)
    units = flat / norms[:, None]
    mean = units[0].clone()
    for _ in range(steps):
        pull = torch.zeros_like(mean)
        for unit, own in zip(units, w, strict=True):
            theta = torch.acos((unit @ mean).clamp(-1, 1))
            if theta > 1e-9:
                pull += own * theta / theta.sin() * (unit - (unit @ mean) * mean)
        angle = pull.norm()
        if angle < 1e-12:
            break
        mean = mean * angle.cos() + pull / angle * angle.sin()
        mean = mean / mean.norm()
    return ((w * norms).sum() * mean).view(vectors.shape[1:])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_multislerp(normalize, count):
    merged = merge_matrices("multislerp", DELTAS[:count], weights=W[:count], normalize=normalize)
    expected = naive_multislerp(DELTAS[:count], W[:count], normalize)
    assert torch.allclose(merged, expected, rtol=1e-11, atol=1e-12)


def test_multislerp_of_weights():
    merged = merge_matrices("multislerp", DELTAS, weights=W, base=BASE, space="weight")
    expected = naive_multislerp(DELTAS + BASE, W)
    assert torch.allclose(BASE + merged, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("count", [2, 3])
def test_directions_that_balance_out_give_the_weighted_sum(count):
    stack = torch.stack([DELTAS[0], -2 * DELTAS[0], torch.zeros_like(BASE)][:count])
    merged = merge_matrices("multislerp", stack, weights=(1.0,) * count)
    assert torch.allclose(merged, -DELTAS[0] / count, rtol=1e-12)


def test_multislerp_needs_a_sum():
    with pytest.raises(MethodError, match="sum to zero"):
        merge_matrices("multislerp", DELTAS[:2], weights=(1, -1))
    merge_matrices("multislerp", DELTAS[:2], weights=(1, -1), normalize=False)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), W])
def test_karcher(count, weights):
    merged = merge_matrices(
        "karcher", DELTAS[:count], weights=weights[:count], space="delta", tol=1e-12, max_iter=200
    )
    expected = naive_karcher(DELTAS[:count], weights[:count])
    assert torch.allclose(merged, expected, rtol=1e-9, atol=1e-10)


def test_karcher_takes_weights_of_models_unless_told():
    merged = merge_matrices("karcher", DELTAS, base=BASE, tol=1e-12, max_iter=200)
    expected = naive_karcher(DELTAS + BASE, (1.0,) * 4)
    assert torch.allclose(BASE + merged, expected, rtol=1e-9, atol=1e-10)


def test_karcher_of_two_is_the_middle_of_the_arc():
    slerp = merge_matrices("slerp", DELTAS[:2] - BASE, base=BASE, t=0.5)
    a, b = DELTAS[:2]
    middle = a / a.norm() + b / b.norm()
    merged = merge_matrices("karcher", DELTAS[:2], space="delta")
    assert torch.allclose(merged / merged.norm(), middle / middle.norm(), rtol=1e-9)
    assert float(merged.norm()) == pytest.approx(float(a.norm() + b.norm()) / 2)
    assert not torch.allclose(merged, slerp + BASE)  # slerp keeps no mean length


def test_zero_tensors_have_no_direction_but_a_length():
    stack = torch.stack([DELTAS[0], torch.zeros_like(BASE)])
    for method in ("karcher", "multislerp"):
        merged = merge_matrices(method, stack, space="delta")
        assert torch.allclose(merged, DELTAS[0] / 2, rtol=1e-12)


def test_opposite_directions_have_a_mean_of_karcher_all_the_same():
    stack = torch.stack([DELTAS[0], -DELTAS[0]])
    merged = merge_matrices("karcher", stack, space="delta")
    assert bool(torch.isfinite(merged).all())
