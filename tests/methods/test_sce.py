"""Guards SCE against a transcription, entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eutectic.methods import merge_matrices

DELTAS = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def naive(deltas: Tensor, top: float = 1.0, least: float = 0.0) -> Tensor:
    flat = deltas.flatten(1).clone()
    experts, n = flat.shape
    if top < 1:
        variances = [float(flat[:, i].var(unbiased=False)) for i in range(n)]
        count = int(sum(v != 0 for v in variances) * top)
        chosen = sorted(range(n), key=lambda i: -variances[i])[:count]
        mask = torch.zeros(n, dtype=flat.dtype)
        mask[chosen] = 1
        flat *= mask
    energies = [float(x.square().mean()) for x in flat]
    total = sum(energies)
    shares = [1 / experts] * experts if total <= least else [e / total for e in energies]
    merged = torch.zeros(n, dtype=flat.dtype)
    for i in range(n):
        column = flat[:, i].tolist()
        sign = 1 if sum(column) >= 0 else -1
        agree = [t for t in range(experts) if column[t] * sign > 0]
        share = sum(shares[t] for t in agree)
        merged[i] = sum(shares[t] * column[t] for t in agree) / share if agree else 0.0
    return merged.view(deltas.shape[1:])


@pytest.mark.parametrize("top", [0.0, 0.1, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_against_the_transcription(top, count):
    merged = merge_matrices("sce", DELTAS[:count], select_topk=top)
    assert torch.allclose(merged, naive(DELTAS[:count], top), rtol=1e-12, atol=1e-15)


def test_the_louder_expert_has_more_to_say():
    stack = torch.stack([DELTAS[0].abs(), 3 * DELTAS[1].abs()])
    merged = merge_matrices("sce", stack)
    energies = stack.flatten(1).square().mean(1)
    shares = energies / energies.sum()
    expected = shares[0] * stack[0] + shares[1] * stack[1]
    assert torch.allclose(merged, expected, rtol=1e-12)


def test_negligible_energies_count_as_equal():
    small = 1e-4 * torch.stack([DELTAS[0], 3 * DELTAS[1]])
    merged = merge_matrices("sce", small, negligible=1e-6)
    assert torch.allclose(merged, naive(small, least=1e-6), rtol=1e-12)
    assert not torch.allclose(merged, merge_matrices("sce", small), rtol=1e-3)


def test_a_weight_counts_as_so_many_experts():
    doubled = merge_matrices("sce", DELTAS[[0, 0, 1]], select_topk=0.6)
    weighted = merge_matrices("sce", DELTAS[:2], weights=(2, 1), select_topk=0.6)
    assert torch.allclose(doubled, weighted, rtol=1e-12)


def test_entries_in_which_experts_agree_are_never_selected():
    stack = DELTAS[:2].clone()
    stack[1, :3] = stack[0, :3]
    merged = merge_matrices("sce", stack, select_topk=0.999)
    assert not merged[:3].any()
    assert int((merged[3:] != 0).sum()) == int(30 * 0.999)
