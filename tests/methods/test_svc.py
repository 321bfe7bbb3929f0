"""Guards SVC against a transcription, and what its factors mean."""

from __future__ import annotations

import pytest
import torch

from eutectic.errors import MethodError
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.methods import Context, as_post, merge_matrices
from eutectic.methods.matrices import processed
from eutectic.types import LayerStatistics

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
@pytest.mark.parametrize("directions", ["auto", "merge", "sum"])
def test_against_the_transcription(of, metric, directions):
    weights = [1.0, 0.5, *[2.0] * (EXPERTS - 2)]
    grams = [torch.eye(IN, dtype=torch.float64)] * EXPERTS
    if metric == "inputs":
        grams = [entry.gram.double() / entry.count for entry in STATISTICS]
    merged = merge_matrices(of, DELTAS, weights=weights)
    total = sum(w * d for w, d in zip(weights, DELTAS, strict=True))
    expected = naive(merged, total if directions == "sum" else merged, grams, weights)
    post = {"method": "svc", "metric": metric, "directions": directions}
    found = merge_matrices(of, DELTAS, weights=weights, statistics=STATISTICS, post=post)
    assert float((found - expected).norm() / expected.norm()) < 1e-7  # Grams are float32


def test_what_all_share_is_counted_once_and_what_one_has_is_kept():
    shared, own = torch.zeros(2, 6, 6)
    shared[0, 0], own[1, 1] = 1.0, 1.0
    deltas = torch.stack([shared, shared, shared + own])
    merged = merge_matrices("task_arithmetic", deltas, post="svc", full_output=True)
    assert torch.allclose(merged.delta, shared + own, atol=1e-6)
    assert merged.record["svc"]["mean_factor"] == pytest.approx((1 / 3 + 1) / 2)


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
    found, expected = (merge_matrices(of, deltas, post="svc") for deltas in (told, exact))
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_a_lack_of_inputs_is_refused_or_told():
    post = {"method": "svc", "metric": "inputs"}
    with pytest.raises(MethodError, match="post-processor 'svc' needs statistics with 'gram'"):
        merge_matrices("task_arithmetic", DELTAS, post=post)
    merged = merge_matrices(
        "task_arithmetic", DELTAS, statistics=[None] * EXPERTS, post=post, fallback="allow",
        full_output=True,
    )  # fmt: skip
    told = merged.record["svc"]
    assert told["metric"] == "plain" and "no statistics" in told["reason"]
    assert torch.equal(merged.delta, merge_matrices("task_arithmetic", DELTAS, post="svc"))


LAWFUL = ["task_arithmetic", "tsv_m", "iso_cts", "knots_ties", "core_ties"]


@pytest.mark.parametrize("metric", ["plain", "inputs"])
def test_one_expert_and_experts_that_share_nothing_are_left_alone(metric):
    post = {"method": "svc", "metric": metric}
    alone = merge_matrices("task_arithmetic", DELTAS[:1], statistics=STATISTICS[:1], post=post)
    assert float((alone - DELTAS[0]).norm() / DELTAS[0].norm()) < 1e-9
    apart = torch.zeros(2, OUT, IN, dtype=torch.float64)
    for t, own in enumerate((slice(0, 2), slice(2, 5))):
        apart[t, own, own] = DELTAS[t, own, own]
    merged = merge_matrices("task_arithmetic", apart, statistics=STATISTICS[:2], post=post)
    assert float((merged - apart.sum(0)).norm() / merged.norm()) < 1e-9
    assert not merge_matrices("task_arithmetic", 0 * apart, post="svc").any()


def test_the_size_of_a_sum_plays_no_part():
    """Twice a merge is the same once it is calibrated, where no expert's part is below 1/T."""
    shared = (DELTAS[:1] + 0.05 * DELTAS)[:, :3]
    context = Context(weights=(1.0,) * EXPERTS, experts=("a", "b", "c", "d")[:EXPERTS])
    one, _ = processed(as_post("svc"), 2 * shared.sum(0), shared, context)
    two, _ = processed(as_post("svc"), 4 * shared.sum(0), shared, context)
    assert float((one - two).norm() / one.norm()) < 1e-9


@pytest.mark.parametrize("of", LAWFUL)
@pytest.mark.parametrize("metric", ["plain", "inputs"])
def test_laws_after_other_methods(of, metric):
    post = {"method": "svc", "metric": metric}

    def merged(order=tuple(range(EXPERTS)), factor=1.0, turn=None):
        deltas = factor * DELTAS[list(order)]
        statistics = [STATISTICS[t] for t in order]
        if turn is not None:
            left, right = turn
            deltas = left @ deltas @ right
            statistics = [
                LayerStatistics(gram=right.mT @ s.gram.double() @ right, count=s.count)
                for s in statistics
            ]
        return merge_matrices(of, deltas, statistics=statistics, post=post)

    plain = merged()
    assert float((merged(factor=-3.0) + 3 * plain).norm() / plain.norm()) < 1e-6
    back = merged(order=tuple(reversed(range(EXPERTS))))
    assert float((back - plain).norm() / plain.norm()) < 1e-6
    if of != "knots_ties":  # which trims entries of the inputs' own axes
        turn = [torch.linalg.qr(randn(n, n, seed=n).double())[0] for n in (OUT, IN)]
        turned = merged(turn=turn)
        expected = turn[0] @ plain @ turn[1]
        assert float((turned - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("of", ["task_arithmetic", "tsv_m", "core_ties", "ties"])
@pytest.mark.parametrize("directions", ["merge", "sum"])
def test_thin_factors_give_what_their_products_do(of, directions):
    pairs = [(randn(60, r, seed=r).double(), randn(r, 40, seed=9 * r).double()) for r in (1, 2, 3)]
    post = {"method": "svc", "directions": directions}
    thin = merge_matrices(of, pairs, post=post)
    whole = merge_matrices(of, torch.stack([a @ b for a, b in pairs]), post=post)
    assert float((thin - whole).norm() / whole.norm()) < 1e-6


def test_a_thin_merge_stays_thin():
    left, right = [randn(30, 2, seed=s) for s in (1, 2)], [randn(2, 20, seed=s) for s in (3, 4)]
    deltas = LowRankStack(tuple(left), tuple(right))
    context = Context(weights=(1.0, 1.0), experts=("a", "b"))
    found, told = processed(as_post("svc"), deltas.total(), deltas, context)
    assert isinstance(found, LowRank) and found.right.shape == (4, 20)
    expected = merge_matrices("task_arithmetic", deltas.dense(), post="svc")
    assert float((found.dense() - expected).norm() / expected.norm()) < 1e-5
    assert told["metric"] == "plain"
