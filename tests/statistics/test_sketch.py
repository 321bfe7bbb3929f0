"""Sketched sums against the matrix that they never form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import eutectic
from eutectic.errors import RequestError
from eutectic.statistics.gram import MOST, TAIL, GramSum, enough
from eutectic.statistics.sketch import SketchSum, columns, sum_bytes, sum_of

WIDTH, RANK, COUNT = 160, 8, 2600


def rows(seed: int = 0, power: float = 1.0, count: int = COUNT) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    sizes = torch.arange(1, WIDTH + 1) ** -power
    return (torch.randn(count, WIDTH, generator=generator) * sizes) @ turned


def summed(pieces: list[Tensor], rank: int = RANK) -> SketchSum:
    total = SketchSum(WIDTH, rank)
    for piece in pieces:
        total.add(piece.clone())
    return total


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_is_near_the_least_and_is_told_exactly(power: float, dtype: torch.dtype):
    x = rows(power=power).to(dtype)
    exact = x.double().mT @ x.double()
    stored = summed([x]).tensors()
    factor, diagonal = stored["factor"], stored["diagonal"]
    assert factor.shape == (RANK, WIDTH) and bool((diagonal >= 0).all())
    rest = exact - factor.mT @ factor
    values = torch.linalg.eigvalsh(exact).flip(0)
    assert float(torch.linalg.eigvalsh(rest)[0]) > -1e-5 * float(exact.trace())
    nuclear = float(torch.linalg.svdvals(rest).sum())
    # Up to the rounding of the float32 products.
    assert float(diagonal.sum()) == pytest.approx(
        nuclear, rel=1e-3, abs=2e-5 * float(exact.trace())
    )
    assert nuclear < 1.3 * float(values[RANK:].sum())
    whole = factor.mT @ factor + torch.diag(diagonal)
    torch.testing.assert_close(whole.diagonal(), exact.diagonal(), rtol=1e-5, atol=0)


def test_the_sum_does_not_depend_on_how_rows_are_cut():
    x = rows()
    edges = (0, 3, 511, 1400, 1401, COUNT)
    parts = summed([x[a:b] for a, b in zip(edges, edges[1:], strict=False)]).tensors()
    assert all(torch.equal(parts[k], v) for k, v in summed([x]).tensors().items())


@pytest.mark.parametrize("cut", [5, 512, 900])
def test_going_on_from_a_state_is_exact(cut: int):
    x = rows()
    second = SketchSum(WIDTH, RANK)
    second.load({k: v.clone() for k, v in summed([x[:cut]]).state().items()})
    second.add(x[cut:].clone())
    assert all(torch.equal(second.tensors()[k], v) for k, v in summed([x]).tensors().items())


@pytest.mark.parametrize("cut", [0, 100, 1300])
def test_sums_of_two_workers_join(cut: int):
    x = rows()
    whole, first = summed([x]).tensors(), summed([x[:cut]])
    first.join(summed([x[cut:]]).state())
    joined = first.tensors()
    assert first.count == COUNT
    exact = (x.mT @ x).double()
    for one in (whole, joined):
        near = one["factor"].mT @ one["factor"] + torch.diag(one["diagonal"])
        torch.testing.assert_close(near.diagonal(), exact.diagonal(), rtol=1e-5, atol=0)
    apart = (joined["factor"].mT @ joined["factor"] - whole["factor"].mT @ whole["factor"]).norm()
    assert float(apart / exact.norm()) < 1e-4


def test_few_rows_are_exact():
    x = rows(count=5)
    stored = summed([x]).tensors()
    assert stored.keys() == {"factor"}
    torch.testing.assert_close(stored["factor"].mT @ stored["factor"], (x.mT @ x).double())
    more = summed([rows(count=30)]).tensors()
    assert more["factor"].shape == (RANK, WIDTH) and "diagonal" in more


def test_nothing_and_zeros():
    assert SketchSum(WIDTH, RANK).tensors() == {}
    stored = summed([torch.zeros(600, WIDTH)]).tensors()
    assert not bool(stored["factor"].any()) and not bool(stored["diagonal"].any())


def test_low_rank_is_found_whole():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(COUNT, 4, generator=generator) @ torch.randn(4, WIDTH, generator=generator)
    stored = summed([x]).tensors()
    exact = (x.mT @ x).double()
    assert float((stored["factor"].mT @ stored["factor"] - exact).norm() / exact.norm()) < 1e-4


def test_a_sketch_takes_less_memory_than_the_matrix_and_is_taken_where_it_does():
    assert isinstance(sum_of(4 * RANK + 32, RANK), SketchSum)
    assert isinstance(sum_of(4 * RANK + 31, RANK), GramSum)
    assert isinstance(sum_of(4096, None), GramSum) and isinstance(sum_of(4096, "auto"), SketchSum)
    assert sum_bytes(14336, 256) < 8 * 14336**2 / 10
    assert columns("auto") == 2 * MOST + 16


def test_auto_takes_the_fewest_directions_that_leave_a_tenth():
    x = rows(power=1.0, count=900)
    total = GramSum(WIDTH)
    total.add(x)
    stored = total.tensors("auto")
    values = torch.linalg.eigvalsh(x.double().mT @ x.double()).flip(0)
    shares = values.cumsum(0) / values.sum()
    fewest = int((shares < 1 - TAIL).sum()) + 1
    assert stored["factor"].shape[0] == fewest
    left = float(stored["diagonal"].sum() / values.sum())
    assert left <= TAIL + 1e-3
    assert enough(torch.ones(2000), 2000.0) == MOST


def collected(tmp_path: Path, seed: int, rank: object, name: str) -> eutectic.StatisticsFile:
    model = nn.Sequential(nn.Linear(WIDTH, 4))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[0].bias.zero_()
    x = rows(seed, count=1200)
    batches = [x[i : i + 100].reshape(25, 4, WIDTH) for i in range(0, 1200, 100)]
    return eutectic.collect(model, batches, tmp_path / name, rank=rank)


def test_a_collection_says_what_its_directions_leave(tmp_path: Path):
    found = collected(tmp_path, 0, RANK, "a.safetensors")
    entry = found["0.weight"]
    assert entry.gram is None and entry.gram_factor is not None and len(entry.gram_factor) == RANK
    whole = collected(tmp_path, 0, None, "b.safetensors")["0.weight"].dense_gram()
    assert whole is not None and entry.gram_diagonal is not None
    share = float(entry.gram_diagonal.sum()) / float(whole.trace())
    said = found.provenance["beside_directions"]["0.weight"]
    assert said == pytest.approx(share, abs=1e-4) and 0.05 < said < 0.6
    assert f"up to {100 * said:.2g} % of a Gram's trace (0.weight)" in repr(found)
    assert json.dumps(found.provenance)


def test_files_of_few_directions_add_up(tmp_path: Path):
    from eutectic.statistics import add_statistics

    for rank in (RANK, "auto"):
        parts = [collected(tmp_path, seed, rank, f"{rank}-{seed}") for seed in (0, 1)]
        total = add_statistics(parts)
        exact = sum(
            (
                collected(tmp_path, seed, None, f"w{seed}")["0.weight"].dense_gram()
                for seed in (0, 1)
            ),
            torch.zeros(WIDTH, WIDTH).double(),
        )
        entry = total["0.weight"]
        found = entry.dense_gram()
        assert found is not None and entry.gram_factor is not None
        torch.testing.assert_close(found.diagonal(), exact.diagonal(), rtol=1e-4, atol=0)
        assert len(entry.gram_factor) <= (RANK if rank == RANK else WIDTH)
        assert total.provenance["beside_directions"]["0.weight"] < 0.7


@pytest.mark.parametrize("bad", [0, -1, "all", 1.5])
def test_a_rank_is_a_number_or_auto(bad: object, tmp_path: Path):
    with pytest.raises(RequestError, match="rank must be at least 1, or 'auto'"):
        collected(tmp_path, 0, bad, "x")
