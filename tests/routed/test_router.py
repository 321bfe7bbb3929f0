"""Routers against their formulas, and every way in which statistics can fall short."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from eutectic.errors import StatisticsError
from eutectic.routed.router import discriminant_router, prototype_router, shrunk
from eutectic.types import LayerStatistics

from .world import summed


def tasks(count: int = 3, width: int = 6, samples: int = 50, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=g).double()
    return [
        torch.randn(samples, width, generator=g).double() @ mixing
        + 3 * torch.randn(width, generator=g)
        for _ in range(count)
    ]


def statistics(data: list[torch.Tensor]) -> list[LayerStatistics]:
    return [summed([row.unsqueeze(0) for row in rows]) for rows in data]


def test_the_prototype_router_is_the_cosine_with_mean_inputs():
    data = tasks()
    x = torch.randn(5, 6)
    expected = torch.stack(
        [torch.cosine_similarity(x, rows.mean(0).float().expand(5, 6)) for rows in data], 1
    )
    torch.testing.assert_close(prototype_router(statistics(data), "layer")(x), expected)


def test_discriminant_scores_differ_by_a_constant_from_the_formula():
    data = tasks()
    means = torch.stack([rows.mean(0) for rows in data])
    within = sum((rows - rows.mean(0)).T @ (rows - rows.mean(0)) for rows in data) / (150 - 3)
    covariance = 0.8 * within + 0.2 * within.trace() / 6 * torch.eye(6, dtype=torch.float64)
    x = torch.randn(5, 6).double()
    solved = torch.linalg.solve(covariance, means.T)
    expected = x @ solved - 0.5 * (means.T * solved).sum(0)
    found = discriminant_router(statistics(data), "layer", shrinkage=0.2)(x.float()).double()
    gap = found - expected
    torch.testing.assert_close(gap, gap[:, :1].expand_as(gap), atol=1e-3, rtol=0)


def test_estimated_shrinkage_comes_nearer_to_the_truth():
    g = torch.Generator().manual_seed(3)
    scale = torch.linspace(0.5, 2, 20).double()
    truth = (scale**2).diag()
    for samples in (5, 20, 100):
        rows = torch.randn(samples, 20, generator=g).double() * scale
        covariance = rows.T @ rows / samples
        before = (covariance - truth).norm()
        after = (shrunk(covariance, samples) - truth).norm()
        assert after < 0.8 * before
    exact = shrunk(truth, 10**9)
    torch.testing.assert_close(exact, truth, rtol=1e-6, atol=1e-6)


def test_the_discriminant_beats_the_cosine_where_inputs_share_a_large_mean():
    g = torch.Generator().manual_seed(1)
    spread = torch.tensor([20.0] + [0.3] * 7).double()
    data = [
        torch.randn(80, 8, generator=g).double() * spread + 5 + torch.eye(8).double()[t + 1]
        for t in range(3)
    ]
    x = torch.cat([rows[:40] for rows in data]).float()
    train = [rows[40:] for rows in data]
    right = torch.arange(3).repeat_interleave(40)
    share = [
        float((router(x).argmax(1) == right).double().mean())
        for router in (
            discriminant_router(statistics(train), "layer"),
            prototype_router(statistics(train), "layer"),
        )
    ]
    assert share[0] > 0.85 > 0.6 > share[1]


def test_equal_samples_fall_back_to_the_nearest_mean():
    rows = [torch.full((4, 3), float(t)).double() for t in (1, 2)]
    router = discriminant_router(statistics(rows), "layer")
    assert router(torch.tensor([[1.1] * 3, [1.9] * 3])).argmax(1).tolist() == [0, 1]


def test_one_expert_always_wins():
    for make in (discriminant_router, prototype_router):
        scores = make(statistics(tasks(1)), "layer")(torch.randn(4, 6))
        assert scores.shape == (4, 1) and bool(torch.isfinite(scores).all())


def test_routers_stay_float32_when_models_are_converted():
    router = discriminant_router(statistics(tasks()), "layer")
    before = router.weight.clone()
    assert router.to(torch.bfloat16).weight.dtype == torch.float32
    assert torch.equal(router.half().weight, before)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (LayerStatistics(input_sum=torch.zeros(6), count=5), "norm zero"),
        (LayerStatistics(input_sum=torch.ones(6), count=0), "no input sum"),
        (LayerStatistics(count=5), "no input sum"),
        (LayerStatistics(input_sum=torch.full((6,), float("nan")), count=5), "not finite"),
    ],
)
def test_prototypes_that_cannot_be_formed_are_refused(entry: LayerStatistics, message: str):
    with pytest.raises(StatisticsError, match=message):
        prototype_router([*statistics(tasks(1)), entry], "layer")


def test_pooled_statistics_that_fall_short_are_refused():
    with pytest.raises(StatisticsError, match="expert 1: no pooled sums"):
        discriminant_router([*statistics(tasks(1)), LayerStatistics(count=3)], "layer")
    single = [rows[:1] for rows in tasks(2)]
    with pytest.raises(StatisticsError, match="2 samples of 2 experts"):
        discriminant_router(statistics(single), "layer")
    broken = statistics([rows * float("inf") for rows in tasks(2)])
    with pytest.raises(StatisticsError, match="NaN or Inf"):
        discriminant_router(broken, "layer")


@pytest.mark.parametrize(("mean", "samples"), [(30, 5000), (300, 5000), (100, 20000)])
def test_rounding_of_the_stored_sums_does_not_decide(mean: float, samples: int):
    """Inputs that hardly vary about a large mean leave a scatter below the rounding of float32."""
    g = torch.Generator().manual_seed(0)
    offset = mean * (1 + torch.arange(8.0)).double()
    entries, rows = [], []
    for t in range(2):
        x = 0.05 * torch.randn(samples, 64, generator=g).double()
        x[:, :8] = offset + 1e-4 * x[:, :8]
        x[:, 20] += t
        rows.append(x)
        entries.append(
            LayerStatistics(
                count=samples,
                pooled_sum=x.sum(0).float(),
                pooled_gram=(x.T @ x).float(),
                sample_count=samples,
            )
        )
    router = discriminant_router(entries, "layer")
    assert bool(torch.isfinite(router.weight).all())
    for t, x in enumerate(rows):
        assert float((router(x.float()).argmax(1) == t).double().mean()) > 0.95


def test_sums_that_contradict_each_other_are_refused():
    good = statistics(tasks(2))
    assert good[1].pooled_sum is not None
    total = good[1].pooled_sum.clone()
    total[0] = 50 * good[1].pooled_gram.diagonal()[0].sqrt()  # type: ignore[union-attr]
    gram = good[1].pooled_gram.clone()  # type: ignore[union-attr]
    gram[5, 5] += 1e8  # so that the trace of the scatter stays positive
    bad = dataclasses.replace(good[1], pooled_sum=total, pooled_gram=gram)
    with pytest.raises(StatisticsError, match="'layer'.*contradict"):
        discriminant_router([good[0], bad], "'layer'", shrinkage=1e-6)
