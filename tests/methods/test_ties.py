"""Guards TIES against a plain transcription: trimming, election, cancellations, weights, scopes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from eutectic.errors import MethodError
from eutectic.methods import get_method, merge_matrices
from eutectic.methods.matrices import run_method
from eutectic.methods.registry import Context


def naive_ties(flat: Tensor, density: float, aggregate: str, weights=None) -> Tensor:
    """The published algorithm on flattened task vectors `[T, n]`, entry by entry."""
    experts, n = flat.shape
    weights = [1.0] * experts if weights is None else list(weights)
    kept = torch.zeros_like(flat)
    k = int(density * n)
    for t in range(experts):
        if k:
            limit = flat[t].abs().sort(descending=True).values[k - 1]
            kept[t] = torch.where(flat[t].abs() >= limit, flat[t], torch.zeros(()).to(flat))
    totals = [sum(w * float(x) for w, x in zip(weights, kept[:, i], strict=True)) for i in range(n)]
    signs = [(total > 0) - (total < 0) for total in totals]
    majority = (sum(signs) > 0) - (sum(signs) < 0)
    merged = torch.zeros(n, dtype=flat.dtype)
    for i in range(n):
        elected = signs[i] or majority
        agreeing = [
            (w, float(x))
            for w, x in zip(weights, kept[:, i], strict=True)
            if elected * float(x) > 0
        ]
        total = sum(w * x for w, x in agreeing)
        share = sum(w for w, _ in agreeing) if aggregate == "mean" else 1.0
        merged[i] = total / share if agreeing and share else 0.0
    return merged


# Small integers: sums are exact, cancellations and equal magnitudes are frequent.
integer_stacks = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 4), st.integers(1, 30)),
    elements=st.integers(-3, 3).map(float),
).map(torch.from_numpy)


@settings(deadline=None, max_examples=150)
@given(
    flat=integer_stacks,
    density=st.floats(0, 1),
    aggregate=st.sampled_from(["mean", "sum"]),
)
def test_against_the_transcription(flat, density, aggregate):
    merged = merge_matrices("ties", flat, density=density, aggregate=aggregate)
    assert torch.allclose(merged, naive_ties(flat, density, aggregate), rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=60)
@given(
    flat=integer_stacks,
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=4, max_size=4),
    aggregate=st.sampled_from(["mean", "sum"]),
)
def test_weights_against_the_transcription(flat, weights, aggregate):
    weights = weights[: len(flat)]
    merged = merge_matrices("ties", flat, density=0.6, aggregate=aggregate, weights=weights)
    expected = naive_ties(flat, 0.6, aggregate, weights)
    assert torch.allclose(merged, expected, rtol=1e-12, atol=1e-15)


def test_an_expert_of_negative_weight_votes_as_it_stands_but_counts_against():
    flat = torch.tensor([[2.0, 2.0], [-1.0, 5.0]])
    merged = merge_matrices("ties", flat, density=1.0, aggregate="sum", weights=(2, -1))
    assert torch.equal(merged, naive_ties(flat, 1.0, "sum", (2, -1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_numbers_in_both_widths(dtype):
    flat = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    merged = merge_matrices("ties", flat, density=0.2)
    assert torch.allclose(merged, naive_ties(flat, 0.2, "mean"), rtol=1e-5)


def test_exactly_density_times_n_entries_are_kept():
    delta = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float() + 1
    for density in (0.001, 0.2, 0.5, 0.999):
        merged = merge_matrices("ties", delta.unsqueeze(0), density=density)
        assert int((merged != 0).sum()) == int(density * 1000)


def test_equal_magnitudes_at_the_threshold_are_all_kept():
    merged = merge_matrices("ties", torch.tensor([[3.0, -2.0, 2.0, 1.0]]), density=0.5)
    assert merged.tolist() == [3.0, -2.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("others", "elected"), [([5.0, 4.0, -1.0], 2.0), ([-5.0, -4.0, 1.0], -2.0), ([5.0, -5.0], 0.0)]
)
def test_an_exact_cancellation_takes_the_majority_sign(others, elected):
    flat = torch.tensor([[2.0, *others], [-2.0, *others]])
    merged = merge_matrices("ties", flat, density=1.0)
    assert merged.tolist() == [elected, *others]


def test_nothing_is_kept_at_density_zero():
    assert not merge_matrices("ties", torch.ones(2, 3, 3), density=0.0).any()


@pytest.mark.parametrize("density", [-0.1, 1.5, "half"])
def test_density_out_of_range(density):
    with pytest.raises(MethodError, match="density"):
        merge_matrices("ties", torch.ones(2, 3, 3), density=density)


@pytest.mark.parametrize("aggregate", ["mean", "sum"])
def test_scope_model_is_ties_on_the_flattened_model(aggregate):
    generator = torch.Generator().manual_seed(1)
    # The second tensor is much smaller in magnitude: trimmed whole by the model's threshold.
    tensors = [
        torch.randn(3, 6, 5, generator=generator),
        1e-3 * torch.randn(3, 7, generator=generator),
        torch.randint(-2, 3, (3, 2, 4), generator=generator).float(),
    ]
    weights = (1.0, 0.5, 2.0)
    method = get_method("ties")
    values = method.parse({"scope": "model", "density": 0.4, "aggregate": aggregate})
    assert method.model_scope(values) and not method.model_scope(method.parse({}))
    context = Context(weights=weights, experts=("a", "b", "c"))
    assert method.prepare is not None
    state = method.prepare(lambda: (x.flatten(1) for x in tensors), values, context)
    merged = [
        run_method(method, x, values, replace(context, state=state)).delta.flatten()
        for x in tensors
    ]
    flat = torch.cat([x.flatten(1) for x in tensors], dim=1)
    expected = naive_ties(flat, 0.4, aggregate, weights)
    assert torch.allclose(torch.cat(merged), expected, rtol=1e-6, atol=0)
    assert not merged[1].any()


DENSITIES = (0.3, 1.0, 0.0, 0.6)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_experts_may_have_densities_of_their_own(method: str) -> None:
    """The engine hands each expert's parameters over; the result is that of doing it by hand."""
    entry = get_method(method)
    values = [d or 0.5 for d in DENSITIES] if method != "ties" else list(DENSITIES)
    flat = torch.randn(4, 101, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    context = Context(weights=(1.0,) * 4, experts=tuple("abcd"), tensor="w")
    own = tuple(entry.parse({"density": d}) for d in values)
    merged = run_method(entry, flat, entry.parse({}), replace(context, own=own)).delta
    # One by one, each expert's part is that of a merge in which all have its density.
    alone = []
    for t, parameters in enumerate(own):
        only = torch.zeros_like(flat)
        only[t] = flat[t]
        part = run_method(get_method("dare_linear" if "dare" in method else "ties"), only,
                          replace_kind(method, parameters), context).delta  # fmt: skip
        alone.append(part)
    if method == "dare_linear":
        torch.testing.assert_close(merged, torch.stack(alone).sum(0))
        return
    kept = torch.stack(alone)
    expected = naive_ties(kept, 1.0, "mean")
    torch.testing.assert_close(merged, expected)
    uniform = run_method(entry, flat, entry.parse({"density": 0.5}), context).delta
    assert not torch.equal(merged, uniform)


def replace_kind(method: str, parameters):
    """Return the parameters of the method that only drops or trims."""
    if method == "ties":
        return parameters
    return get_method("dare_linear").parse({"density": parameters.density})
