"""Guards Consensus against a transcription, entry by entry."""

from __future__ import annotations

import pytest
import torch

from eutectic.methods import merge_matrices

DELTAS = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def naive(deltas, scales, users, weights):
    merged = torch.zeros_like(deltas[0])
    for index in range(merged.numel()):
        own = [w * float(d.flatten()[index]) for d, w in zip(deltas, weights, strict=True)]
        total = sum(own)
        uses = [abs(x) >= c * abs(total - x) for x, c in zip(own, scales, strict=True)]
        if sum(uses) >= users:
            merged.view(-1)[index] = total
    return merged


@pytest.mark.parametrize("users", [0, 1, 2, 4])
@pytest.mark.parametrize("scale", [0.0, 0.3, 0.6, 2.0])
def test_against_the_transcription(scale, users):
    weights = [1.0, 0.5, 2.0, 1.5]
    merged = merge_matrices("consensus", DELTAS, weights=weights, mask_scale=scale, users=users)
    assert torch.allclose(merged, naive(DELTAS, [scale] * 4, users, weights), rtol=1e-12)


def test_what_one_expert_alone_changed_is_left_out():
    shared, selfish = torch.zeros(2, 2, 2)
    shared[0, 0], selfish[1, 1] = 1.0, 5.0
    merged = merge_matrices(
        "consensus", torch.stack([shared, shared + selfish, shared]), mask_scale=0.5
    )
    assert merged.tolist() == [[3.0, 0.0], [0.0, 0.0]]


def test_copies_use_all_of_their_sum():
    stack = DELTAS[:1].expand(2, -1, -1)
    assert torch.equal(merge_matrices("consensus", stack, mask_scale=1.0), 2 * DELTAS[0])
    assert not merge_matrices("consensus", stack, mask_scale=1.01).any()
