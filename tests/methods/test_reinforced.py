"""Guards RAM and RAM+ against transcriptions, entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eutectic.methods import merge_matrices

GENERATOR = torch.Generator().manual_seed(10)
DENSE = torch.randn(3, 6, 8, generator=GENERATOR, dtype=torch.float64)
SPARSE = DENSE * (torch.rand(3, 6, 8, generator=GENERATOR) < 0.4)


def naive(deltas: Tensor, epsilon: float, r: float = 0.0, alpha: float = 0.0) -> Tensor:
    flat = deltas.flatten(1).tolist()
    experts, n = len(flat), len(flat[0])
    owners = [[t for t in range(experts) if abs(flat[t][i]) > epsilon] for i in range(n)]
    factors = []
    for t in range(experts):
        unique = sum(o == [t] for o in owners)
        shared = sum(t in o and len(o) > 1 for o in owners)
        factors.append(1 + r * min(shared / max(unique, 1), alpha))
    merged = [
        flat[own[0]][i] * factors[own[0]]
        if len(own) == 1
        else sum(flat[t][i] for t in own) / max(len(own), 1)
        for i, own in enumerate(owners)
    ]
    return torch.tensor(merged, dtype=deltas.dtype).view(deltas.shape[1:])


@pytest.mark.parametrize("deltas", [DENSE, SPARSE, SPARSE[:1], SPARSE[:2]])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.5])
def test_ram(deltas, epsilon):
    merged = merge_matrices("ram", deltas, epsilon=epsilon)
    assert torch.allclose(merged, naive(deltas, epsilon), rtol=1e-12)


@pytest.mark.parametrize("deltas", [DENSE, SPARSE, SPARSE[:1], SPARSE[:2]])
@pytest.mark.parametrize(("r", "alpha"), [(0.1, 0.2), (0.5, 10.0), (0.0, 1.0)])
def test_ramplus(deltas, r, alpha):
    merged = merge_matrices("ramplus_tl", deltas, epsilon=0.3, r=r, alpha=alpha)
    assert torch.allclose(merged, naive(deltas, 0.3, r, alpha), rtol=1e-12)


def test_weights_matter_where_experts_share():
    stack = torch.tensor([[[1.0, 2.0, 0.0]], [[3.0, 0.0, 0.0]]])
    merged = merge_matrices("ram", stack, weights=(3, 1))
    assert merged.tolist() == [[1.5, 2.0, 0.0]]
