"""Guards SVC against a transcription, and what its factors mean."""

from __future__ import annotations

import pytest
import torch

from eutectic.errors import MethodError
from eutectic.methods import get_method, merge_matrices

from .matching_cases import EXPERTS, IN, OUT, collect, randn

STATISTICS = collect()
DELTAS = randn(EXPERTS, OUT, IN).double()


def naive(merged, directions, grams, weights):
    U, S, Vh = torch.linalg.svd(directions, full_matrices=False)
    members = [t for t, w in enumerate(weights) if w > 0]
    result = merged.clone()
    for r in range(len(S)):
        u, times = U[:, r], []
        for t in members:
            own = u @ DELTAS[t]
            times.append(float((u @ merged) @ grams[t] @ own / (own @ grams[t] @ own)))
        share = [weights[t] * max(1 / len(members), s) for t, s in zip(members, times, strict=True)]
        gamma = sum(share) / sum(weights[t] for t in members)
        result += torch.outer(u, (u @ merged) * (1 / gamma - 1))
    return result


@pytest.mark.parametrize("of", ["task_arithmetic", "tsv_m", "ties"])
@pytest.mark.parametrize("metric", ["plain", "inputs"])
@pytest.mark.parametrize("directions", ["merge", "sum"])
def test_against_the_transcription(of, metric, directions):
    weights = [1.0, 0.5, *[2.0] * (EXPERTS - 2)]
    grams = [torch.eye(IN, dtype=torch.float64)] * EXPERTS
    if metric == "inputs":
        grams = [entry.gram.double() / entry.count for entry in STATISTICS]
    merged = merge_matrices(of, DELTAS, weights=weights)
    total = sum(w * d for w, d in zip(weights, DELTAS, strict=True))
    expected = naive(merged, total if directions == "sum" else merged, grams, weights)
    found = merge_matrices(
        "svc",
        DELTAS,
        weights=weights,
        statistics=STATISTICS,
        of=of,
        metric=metric,
        directions=directions,
    )
    assert float((found - expected).norm() / expected.norm()) < 1e-7  # Grams are float32


def test_what_all_share_is_counted_once_and_what_one_has_is_kept():
    shared, own = torch.zeros(2, 6, 6)
    shared[0, 0], own[1, 1] = 1.0, 1.0
    merged = merge_matrices("svc", torch.stack([shared, shared, shared + own]), full_output=True)
    assert torch.allclose(merged.delta, shared + own, atol=1e-6)
    assert merged.record["mean_factor"] == pytest.approx((1 / 3 + 1) / 2)


@pytest.mark.parametrize("base", [0.0, 30.0])
@pytest.mark.parametrize("of", ["task_arithmetic", "tsv_m"])
def test_rounding_is_no_part_of_an_expert(base: float, of: str):
    """Experts of outputs that are orthogonal, in float32: each direction is of one of them."""
    left = torch.linalg.qr(randn(32, 32).double())[0]
    exact = torch.stack(
        [left[:, 4 * t : 4 * t + 4] @ randn(4, 24, seed=t).double() for t in (1, 2)]
    )
    start = base * randn(32, 24, seed=9).double()
    told = (start + exact).float() - start.float()
    found, expected = (merge_matrices("svc", deltas, of=of) for deltas in (told, exact))
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_a_method_that_is_none_is_refused():
    """As soon as parameters are read: a plan tells it, before a merge begins."""
    with pytest.raises(MethodError, match="did you mean 'iso_c'"):
        merge_matrices("svc", DELTAS, of="isoc")
    for name in ("zero", "mats", "flow"):  # what iterates needs an initial guess itself
        with pytest.raises(MethodError, match=f"of: no method .* got '{name}'"):
            get_method("svc").parse({"of": name})


def test_a_lack_of_inputs_is_told():
    merged = merge_matrices(
        "svc", DELTAS, statistics=[None] * EXPERTS, metric="inputs", fallback="allow",
        full_output=True,
    )  # fmt: skip
    assert merged.record["metric"] == "plain" and "no statistics" in merged.record["reason"]
    assert torch.equal(merged.delta, merge_matrices("svc", DELTAS))
