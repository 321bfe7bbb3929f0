"""Guards DELLA: probabilities by rank in the row, expectation, seeds, rows of one entry."""

from __future__ import annotations

import pytest
import torch

from eutectic.errors import MethodError
from eutectic.methods import merge_matrices

DELTA = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
DRAWS = 600


def kept_shares(delta=DELTA, **more):
    """Return how often each entry is kept, over many seeds."""
    total = torch.zeros(delta.shape[1:], dtype=torch.float64)
    for seed in range(DRAWS):
        total += merge_matrices("della_linear", delta, seed=seed, rescale=False, **more) != 0
    return total / DRAWS


def test_the_probability_is_linear_in_the_rank_of_the_row():
    ranks = DELTA[0].abs().argsort(dim=1).argsort(dim=1).double()
    expected = 0.5 - 0.3 + 2 * 0.3 * ranks / 8
    deviation = (expected * (1 - expected) / DRAWS).sqrt()
    assert float(((kept_shares(epsilon=0.3) - expected) / deviation).abs().max()) < 4.5


def test_a_vector_is_one_row():
    flat = DELTA.flatten(1)
    ranks = flat[0].abs().argsort().argsort().double()
    expected = 0.4 - 0.2 + 2 * 0.2 * ranks / (len(ranks) - 1)
    deviation = (expected * (1 - expected) / DRAWS).sqrt()
    shares = kept_shares(flat, density=0.4, epsilon=0.2)
    assert float(((shares - expected) / deviation).abs().max()) < 4.5


def test_a_row_of_one_entry_has_the_density():
    ones = torch.ones(1, 40, 1)
    share = float(kept_shares(ones, density=0.3, epsilon=0.1).mean())
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / (40 * DRAWS)) ** 0.5


def test_rescaling_by_the_probability_keeps_the_expectation():
    total = torch.zeros_like(DELTA[0])
    for seed in range(DRAWS):
        total += merge_matrices("della_linear", DELTA, seed=seed) / DRAWS
    assert float((total - DELTA[0]).norm() / DELTA.norm()) < 3 * (1 / DRAWS) ** 0.5 * 1.5


def test_rescaling_by_the_sum_of_magnitudes():
    merged = merge_matrices("della_linear", DELTA, rescale="l1")
    assert float(merged.abs().sum()) == pytest.approx(float(DELTA.abs().sum()))
    held = merged != 0
    assert float((merged[held] / DELTA[0][held]).std()) < 1e-12


def test_della_merges_by_sign_what_della_linear_keeps():
    stack = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    w = (0.5, 1.25, -0.25)
    names = ["a", "b", "c"]
    kept = torch.stack(
        [merge_matrices("della_linear", stack[t][None], experts=[names[t]]) for t in range(3)]
    )
    merged = merge_matrices("della", stack, experts=names, weights=w)
    scaled = kept * torch.tensor(w, dtype=kept.dtype).view(3, 1, 1)
    sign = torch.where(scaled.sum(0) >= 0, 1.0, -1.0)
    agree = scaled * sign > 0
    share = (agree * torch.tensor(w, dtype=kept.dtype).view(3, 1, 1)).sum(0)
    expected = (scaled * agree).sum(0) / torch.where(share == 0, 1, share)
    assert torch.allclose(merged, expected, rtol=1e-11)


def test_seed_tensor_and_expert_each_change_the_numbers():
    def run(**more):
        return merge_matrices("della_linear", DELTA, **{"tensor": "w", "experts": ["a"], **more})

    same = run()
    assert torch.equal(run(), same)
    for change in ({"seed": 1}, {"tensor": "v"}, {"experts": ["b"]}):
        assert not torch.equal(run(**change), same)


def test_everything_is_kept_at_density_one():
    assert torch.equal(merge_matrices("della_linear", DELTA, density=1.0), DELTA[0])


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15), (0.5, 0.5)])
def test_probabilities_outside_of_their_range(density, epsilon):
    with pytest.raises(MethodError, match="density ± epsilon"):
        merge_matrices("della", DELTA, density=density, epsilon=epsilon)
