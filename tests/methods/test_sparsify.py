"""Guards DARE: expectation, what is kept, and what the random numbers may depend on."""

from __future__ import annotations

import pytest
import torch

from eutectic.errors import MethodError
from eutectic.methods import get_method, merge_matrices
from eutectic.methods.registry import Context

ONES = torch.ones(1, 200, 100)


def dropped(deltas=ONES, **more):
    return merge_matrices("dare_linear", deltas, **more)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_share_kept_and_the_expectation(density):
    merged = dropped(density=density)
    kept = float((merged != 0).double().mean())
    deviation = (density * (1 - density) / ONES.numel()) ** 0.5
    assert abs(kept - density) < 5 * deviation
    assert abs(float(merged.double().mean()) - 1) < 5 * deviation / density
    assert torch.allclose(merged[merged != 0], torch.tensor(1 / density))


def test_without_rescaling_entries_are_dropped_only():
    merged = dropped(density=0.3, rescale=False)
    assert set(merged.unique().tolist()) == {0.0, 1.0}


def test_weights_scale_the_experts():
    merged = dropped(torch.ones(2, 40, 40), weights=(1, 10), density=0.5)
    assert set(merged.unique().tolist()) == {0.0, 2.0, 20.0, 22.0}


def test_experts_are_dropped_independently():
    merged = dropped(torch.ones(2, 100, 100), density=0.5, weights=(1, 10))
    both = float((merged == 22.0).double().mean())
    assert abs(both - 0.25) < 0.03


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_seed_tensor_and_expert_each_change_the_numbers(method):
    def run(**more):
        return merge_matrices(method, ONES, **{"tensor": "w", "experts": ["a"], **more})

    same = run()
    assert torch.equal(run(), same)
    assert not torch.equal(run(seed=1), same)
    assert not torch.equal(run(tensor="v"), same)
    assert not torch.equal(run(experts=["b"]), same)


def test_an_expert_does_not_depend_on_its_company():
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 20, 20, generator=generator)
    alone = dropped(a.unsqueeze(0), experts=["a"])
    together = dropped(torch.stack([c, b, a]), experts=["c", "b", "a"], weights=(0, 0, 1))
    assert torch.equal(alone, together)


def test_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(0)
    first = dropped()
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(dropped(), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("cuts", [(1,), (17, 18, 150), (199,)])
def test_chunks_give_the_same_bytes(cuts):
    flat = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    method = get_method("dare_linear")
    values, context = method.parse({}), Context(weights=(1.0, 1.0), experts=("a", "b"), tensor="w")
    whole = merge_matrices("dare_linear", flat, experts=["a", "b"], tensor="w")
    parts, offset = [], 0
    for chunk in torch.tensor_split(flat, cuts, dim=1):
        at = Context(weights=context.weights, experts=context.experts, tensor="w", offset=offset)
        parts.append(method.function(chunk, values, at))
        offset += chunk.shape[1]
    assert torch.equal(torch.cat(parts), whole)


def test_the_numbers_never_change_between_releases():
    merged = dropped(torch.ones(1, 12), density=0.5, experts=["a"], tensor="w", seed=3)
    assert (merged / 2).int().tolist() == [1, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("density", [0.0, -1.0, 1.1])
def test_density_out_of_range(density):
    with pytest.raises(MethodError, match="density"):
        dropped(density=density)
