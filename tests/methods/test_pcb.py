"""Guards PCB against a transcription with sorted lists."""

from __future__ import annotations

import math

import pytest
import torch

from eutectic.methods import merge_matrices

DELTAS = torch.randn(4, 20, 31, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def naive(deltas, density, clamp, weights):
    own = [(w * d).flatten().tolist() for d, w in zip(deltas, weights, strict=True)]
    n, members = len(own[0]), sum(w != 0 for w in weights)
    total = [sum(column) for column in zip(*own, strict=True)]
    drawn, shares = [], []
    for x in own:
        ranked = sorted(map(abs, x))
        low, high = ranked[int(n * clamp)], ranked[int(n * (1 - clamp) - 1)]
        sizes = [min(max(abs(value), low), high) for value in x]
        drawn.append([math.copysign(s, v) if v else 0.0 for s, v in zip(sizes, x, strict=True)])
        part = [(s - low) / (high - low) if high > low else 0.0 for s in sizes]
        balance = [
            math.exp(members * p * p) * math.tanh(v * t)
            for p, v, t in zip(part, x, total, strict=True)
        ]
        ranked = sorted(balance)
        least, most = ranked[int(n * (1 - density))] if density < 1 else ranked[0], ranked[-1]
        shares.append(
            [(max(b, least) - least) / (most - least) if most > least else 0.0 for b in balance]
        )
    merged = []
    for i in range(n):
        mass = sum(s[i] for s in shares)
        merged.append(sum(d[i] * s[i] for d, s in zip(drawn, shares, strict=True)) / (mass or 1))
    return torch.tensor(merged, dtype=torch.float64).view(deltas.shape[1:])


@pytest.mark.parametrize("size", [1e-4, 1.0])
@pytest.mark.parametrize("clamp", [0.0, 1e-4, 0.05])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.9, 1.0])
def test_against_the_transcription(density, clamp, size):
    weights = [1.0, 0.5, 2.0, 0.0]
    merged = merge_matrices("pcb", size * DELTAS, weights=weights, density=density, clamp=clamp)
    expected = naive(size * DELTAS, density, clamp, weights)
    assert torch.allclose(merged, expected, rtol=1e-9, atol=1e-13 * size)


def test_large_entries_that_agree_win():
    small = 0.01 * torch.ones(2, 10, 10)
    small[0, 0, 0], small[1, 0, 0] = 2.0, 2.0
    small[0, 1, 1], small[1, 1, 1] = 2.0, -2.0
    merged = merge_matrices("pcb", small, clamp=0.0, density=0.05)
    assert float(merged[0, 0]) == 2.0
    assert float(merged.abs().sum()) == 2.0  # what the experts contradict each other in is dropped


def test_one_number_for_all_entries_has_no_weight():
    assert not merge_matrices("pcb", torch.ones(2, 3, 4)).any()
