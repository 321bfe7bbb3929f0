"""Guards task arithmetic: a plain weighted sum, in the order of the experts."""

from __future__ import annotations

import pytest
import torch

from eutectic.methods import merge_matrices

DELTAS = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, (0.3, 0.3, 0.3, 0.3), (1.0, -0.5, 0.0, 2.0)])
def test_weighted_sum(weights):
    w = torch.tensor(weights or (1.0,) * 4, dtype=torch.float64)
    merged = merge_matrices("task_arithmetic", DELTAS, weights=weights)
    assert torch.allclose(merged, torch.einsum("t,toi->oi", w, DELTAS), rtol=1e-12)


def test_any_shape():
    assert merge_matrices("task_arithmetic", torch.ones(3, 2)).tolist() == [3.0, 3.0]
    assert merge_matrices("task_arithmetic", torch.ones(2, 1, 2, 2, 2)).shape == (1, 2, 2, 2)
