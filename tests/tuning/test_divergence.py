"""Divergences against transcriptions of their formulas, and at their limits."""

from __future__ import annotations

import math

import pytest
import torch

from eutectic.errors import RequestError
from eutectic.tuning import feature_distance, kl_divergence

GENERATOR = torch.Generator().manual_seed(0)
LEFT, RIGHT = (3 * torch.randn(20, 5, generator=GENERATOR) for _ in range(2))


def test_kl_is_the_formula():
    p, q = LEFT.double().softmax(-1), RIGHT.double().softmax(-1)
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert math.isclose(kl_divergence(LEFT, RIGHT), expected, rel_tol=1e-12)
    assert expected > 0.1 and kl_divergence(LEFT, LEFT) == 0


def test_kl_is_not_symmetric_and_ignores_shifts_of_logits():
    assert abs(kl_divergence(LEFT, RIGHT) - kl_divergence(RIGHT, LEFT)) > 0.01
    shifted = kl_divergence(LEFT + 100, RIGHT - 7)
    assert math.isclose(shifted, kl_divergence(LEFT, RIGHT), rel_tol=1e-5)


def test_kl_of_large_and_masked_logits():
    certain = torch.tensor([[1e4, 0.0, 0.0]])
    assert kl_divergence(certain, certain) == 0
    masked = torch.tensor([[0.0, 0.0, -math.inf]])
    assert math.isclose(kl_divergence(masked, torch.zeros(1, 3)), math.log(1.5), rel_tol=1e-12)
    assert kl_divergence(torch.zeros(1, 3), masked) == math.inf
    assert math.isnan(kl_divergence(torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2)))


def test_kl_in_pieces_is_kl_at_once(monkeypatch):
    whole = kl_divergence(LEFT, RIGHT)
    monkeypatch.setattr("eutectic.tuning.divergence._rows", lambda logits: 3)
    assert math.isclose(kl_divergence(LEFT, RIGHT), whole, rel_tol=1e-12)
    assert math.isclose(
        kl_divergence(LEFT.view(4, 5, 5), RIGHT.view(4, 5, 5)), whole, rel_tol=1e-12
    )


def test_feature_distance():
    mean = LEFT.mean(0, keepdim=True).expand_as(LEFT)
    assert feature_distance(LEFT, LEFT) == 0
    assert math.isclose(feature_distance(LEFT, mean), 1, rel_tol=1e-5)
    far = feature_distance(1000 * LEFT + 5, 1000 * RIGHT + 5)
    assert math.isclose(far, feature_distance(LEFT, RIGHT), rel_tol=1e-4)
    one = torch.tensor([[3.0, 4.0]])
    assert math.isclose(feature_distance(one, torch.tensor([[3.0, 3.0]])), 1 / 25, rel_tol=1e-12)
    zero = torch.zeros(2, 3)
    assert feature_distance(zero, zero) == 0 and feature_distance(zero, zero + 1) == math.inf


@pytest.mark.parametrize("measure", [kl_divergence, feature_distance])
@pytest.mark.parametrize("other", [torch.zeros(20, 4), torch.zeros(19, 5), torch.zeros(0, 5)])
def test_shapes_that_do_not_fit(measure, other):
    with pytest.raises(RequestError, match="one shape and at least one row"):
        measure(other if other.numel() == 0 else LEFT, other)
