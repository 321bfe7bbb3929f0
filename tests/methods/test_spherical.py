"""Guards slerp against the formula, and where the formula breaks down."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eutectic.errors import MethodError
from eutectic.methods import merge_matrices

GENERATOR = torch.Generator().manual_seed(0)
FIRST, SECOND, BASE = torch.randn(3, 4, 6, generator=GENERATOR, dtype=torch.float64)


def slerp(first: Tensor, second: Tensor, **more) -> Tensor:
    """Return the merged weight of two weights."""
    return BASE + merge_matrices(
        "slerp", torch.stack([first - BASE, second - BASE]), base=BASE, **more
    )


def formula(first: Tensor, second: Tensor, t: float) -> Tensor:
    cosine = float((first * second).sum() / (first.norm() * second.norm()))
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


@settings(deadline=None, max_examples=25)
@given(t=st.floats(0, 1))
def test_formula(t):
    assert torch.allclose(slerp(FIRST, SECOND, t=t), formula(FIRST, SECOND, t), rtol=1e-10)


def test_the_ends_are_the_experts():
    assert torch.allclose(slerp(FIRST, SECOND, t=0), FIRST, rtol=1e-12)
    assert torch.allclose(slerp(FIRST, SECOND, t=1), SECOND, rtol=1e-12)


def test_t_comes_from_the_weights():
    assert torch.allclose(slerp(FIRST, SECOND, weights=(1, 3)), slerp(FIRST, SECOND, t=0.75))
    assert torch.allclose(slerp(FIRST, SECOND), slerp(FIRST, SECOND, t=0.5))


def test_one_length_is_kept_on_the_way():
    second = SECOND * FIRST.norm() / SECOND.norm()
    lengths = [float(slerp(FIRST, second, t=t).norm()) for t in (0.1, 0.5, 0.8)]
    assert lengths == pytest.approx([float(FIRST.norm())] * 3, rel=1e-10)


@pytest.mark.parametrize("second", [2 * FIRST, -FIRST, torch.zeros_like(FIRST)])
def test_no_angle_means_a_straight_line(second):
    assert torch.allclose(slerp(FIRST, second, t=0.25), 0.75 * FIRST + 0.25 * second, atol=1e-12)


def test_nearly_parallel_tensors_are_continuous_with_the_formula():
    orthogonal = SECOND - FIRST * (FIRST * SECOND).sum() / FIRST.square().sum()
    orthogonal *= FIRST.norm() / orthogonal.norm()
    for cosine in (0.99949, 0.99951):
        second = cosine * FIRST + math.sqrt(1 - cosine**2) * orthogonal
        close = torch.allclose(slerp(FIRST, second, t=0.3), formula(FIRST, second, 0.3), rtol=1e-3)
        assert close


def test_float32_angles_are_computed_in_float64():
    wide = formula(FIRST, SECOND, 0.5)
    stack = torch.stack([FIRST - BASE, SECOND - BASE]).float()
    merged = merge_matrices("slerp", stack, base=BASE.float(), t=0.5)
    assert torch.allclose(BASE + merged.double(), wide, atol=1e-6)


@pytest.mark.parametrize("weights", [(1, -1), (-1, 3), (0, 0)])
def test_weights_that_give_no_t(weights):
    with pytest.raises(MethodError, match=r"give t in \[0, 1\]"):
        slerp(FIRST, SECOND, weights=weights)


def test_three_experts_are_refused():
    with pytest.raises(MethodError, match="exactly 2 experts, got 3"):
        merge_matrices("slerp", torch.ones(3, 2, 2), base=torch.ones(2, 2))


def test_the_base_is_needed():
    with pytest.raises(MethodError, match="needs base"):
        merge_matrices("slerp", torch.ones(2, 2, 2))


def nuslerp_of(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The formula on two vectors; a zero vector is orthogonal to all, as in mergekit."""
    lengths = float(first.norm() * second.norm())
    cosine = float(first @ second) / lengths if lengths else 0.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if 1 - cosine**2 <= 1e-12:
        return (1 - t) * first + t * second
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 0.9), (2.0, -0.5)])
@pytest.mark.parametrize("vectors", ["tensor", "rows", "columns"])
def test_nuslerp(weights, vectors):
    first, second = FIRST.clone(), SECOND.clone()
    first[1] = 0  # a zero row
    second[2] = first[2]  # the same row twice
    t = weights[1] / sum(weights)
    merged = merge_matrices(
        "nuslerp", torch.stack([first, second]), weights=weights, vectors=vectors
    )
    if vectors == "tensor":
        expected = nuslerp_of(first.flatten(), second.flatten(), t).view_as(first)
    elif vectors == "rows":
        rows = zip(first, second, strict=True)
        expected = torch.stack([nuslerp_of(a, b, t) for a, b in rows])
    else:
        columns = zip(first.T, second.T, strict=True)
        expected = torch.stack([nuslerp_of(a, b, t) for a, b in columns]).T
    assert torch.allclose(merged, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("vectors", ["tensor", "rows", "columns"])
@pytest.mark.parametrize("shape", [(6,), (2, 3, 4)])
def test_nuslerp_of_other_shapes(vectors, shape):
    stack = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    merged = merge_matrices("nuslerp", stack, weights=(1, 2), vectors=vectors)
    moved = stack if vectors != "columns" or len(shape) == 1 else stack.movedim(1, -1)
    width = math.prod(shape) if vectors == "tensor" or len(shape) == 1 else moved.shape[-1]
    pairs = zip(*moved.reshape(2, -1, width), strict=True)
    expected = torch.stack([nuslerp_of(a, b, 2 / 3) for a, b in pairs]).view(moved.shape[1:])
    expected = expected if moved is stack else expected.movedim(-1, 0)
    assert torch.allclose(merged, expected, rtol=1e-10, atol=1e-12)


def test_nuslerp_of_weights_is_slerp():
    stack = torch.stack([FIRST - BASE, SECOND - BASE])
    merged = merge_matrices("nuslerp", stack, base=BASE, weights=(1, 3), space="weight")
    assert torch.allclose(BASE + merged, slerp(FIRST, SECOND, t=0.75), rtol=1e-10)


def test_nuslerp_of_opposite_vectors_is_a_straight_line():
    merged = merge_matrices("nuslerp", torch.stack([FIRST, -FIRST]), weights=(1, 3))
    assert torch.allclose(merged, -FIRST / 2, rtol=1e-10)


def test_nuslerp_needs_a_sum():
    with pytest.raises(MethodError, match="sum to zero"):
        merge_matrices("nuslerp", torch.stack([FIRST, SECOND]), weights=(1, -1))
