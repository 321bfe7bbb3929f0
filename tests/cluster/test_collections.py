"""Collections on a real cluster: the sums of one process, divided, lost, saved and taken up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eutectic
from eutectic.cluster import crew as crew_file
from eutectic.statistics import sharded_pass
from eutectic.statistics.gram import GramSum
from helpers.folders import digests

pytestmark = [pytest.mark.ray, pytest.mark.slow]
WIDTH = 6


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 3))


def some_batches(count: int = 9) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4 + i % 3, WIDTH, generator=generator) for i in range(count)]


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)  # products are of float32


def same_sums(one: Any, other: Any) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].count == other[name].count
        for kind in ("gram", "input_sum", "pooled_gram", "pooled_sum"):
            close(getattr(one[name], kind), getattr(other[name], kind))
    assert one.provenance["data"] == other.provenance["data"]


@pytest.fixture(scope="module")
def where(nodes: Any) -> dict[str, Any]:
    """Two workers: each is a process, whose start takes longer than all that it does here."""
    return {"executor": "ray", "ray_address": str(nodes.address), "shards": 2}


@pytest.fixture(scope="module")
def undisturbed(where: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a collection that nothing disturbs writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    eutectic.collect(a_model(), some_batches(), folder / "a", **where)
    return digests(folder)["a"]


def test_workers_add_up_to_what_one_process_has(
    tmp_path: Path, where: dict[str, Any], undisturbed: str
) -> None:
    batches = some_batches()
    told: list[int] = []
    found = eutectic.collect(
        a_model(),
        iter(batches),
        tmp_path / "a",
        progress=lambda done, _: told.append(done),
        **{**where, "shards": None},  # as many as the cluster has cores
        open_model=a_model,
    )
    same_sums(found, eutectic.collect(a_model(), batches))
    naive = sum(x.double().T @ x.double() for x in batches)
    close(found["0.weight"].dense_gram().double(), naive)
    assert told == list(range(1, 10))
    one = eutectic.collect(a_model(), batches, tmp_path / "b", **where)
    assert digests(tmp_path)["b"] == undisturbed
    same_sums(one, found)


def test_gradients_are_added_too(where: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"fisher": True, "output_gradients": True, "labels": "sample"}
    batches = some_batches(5)
    alone = eutectic.collect(a_model(), batches, **asked)
    found = eutectic.collect(a_model(), batches, **asked, **where)
    same_sums(found, alone)
    for name in alone:
        one, other = found[name], alone[name]
        close(one.fisher_diagonal, other.fisher_diagonal)
        close(one.output_gradient_gram, other.output_gradient_gram)


@pytest.mark.parametrize("saved", [False, True])
def test_a_lost_worker_is_replaced(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: dict[str, Any],
    undisturbed: str,
    saved: bool,
) -> None:
    batches = some_batches()
    ask: Callable[..., Any] = crew_file.Crew.ask
    asked: list[int] = []

    def lose_one(crew: Any, number: int, method: str, *arguments: Any) -> Any:
        asked.append(number)
        if method == "add" and arguments[0] == 7 and "lost" not in asked:
            asked.append("lost")  # pyright: ignore
            crew._ray.kill(crew._members[number])
        return ask(crew, number, method, *arguments)

    monkeypatch.setattr(crew_file.Crew, "ask", lose_one)
    seconds = 0.0 if saved else 60.0
    eutectic.collect(a_model(), batches, tmp_path / "lost", snapshot_seconds=seconds, **where)
    assert "lost" in asked
    assert digests(tmp_path)["lost"] == undisturbed


def test_an_interrupted_collection_goes_on(
    tmp_path: Path, where: dict[str, Any], undisturbed: str
) -> None:
    batches, alone = some_batches(), eutectic.collect(a_model(), some_batches())

    def interrupt(done: int, _: object) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        eutectic.collect(
            a_model(), batches, tmp_path / "ray", progress=interrupt, snapshot_seconds=0.0, **where
        )
    further = {"ray": where, "fewer": {**where, "shards": 1}, "threads": {}}
    for then in ("fewer", "threads"):
        shutil.copytree(tmp_path / "ray.partial", tmp_path / f"{then}.partial")
    for then, asked in further.items():
        told: list[int] = []
        tell: Callable[..., None] = partial(lambda told, n, _: told.append(n), told)
        found = eutectic.collect(a_model(), batches, tmp_path / then, progress=tell, **asked)
        assert told[0] <= 7 if then == "threads" else told[0] == 7
        same_sums(found, alone)
        assert not (tmp_path / f"{then}.partial").exists()
    assert digests(tmp_path)["ray"] == undisturbed


def test_an_error_of_a_worker_is_raised_here(where: dict[str, Any]) -> None:
    bad = [*some_batches(3), torch.full((2, WIDTH), torch.nan)]
    with pytest.raises(eutectic.EutecticError, match=r"0\.weight"):
        eutectic.collect(a_model(), bad, **{**where, "shards": 1})


@pytest.mark.parametrize(
    ("options", "text"),
    [({"shards": 2}, "for the workers of a cluster"), ({"open_model": a_model}, "for the workers")],
)
def test_options_of_a_cluster_need_one(options: dict[str, Any], text: str) -> None:
    with pytest.raises(eutectic.EutecticError, match=text):
        eutectic.collect(a_model(), some_batches(), **options)


def test_more_shards_than_cores_are_refused(where: dict[str, Any]) -> None:
    with pytest.raises(eutectic.EutecticError, match="the cluster has 3"):
        eutectic.collect(a_model(), some_batches(), **{**where, "shards": 4})


@pytest.mark.parametrize("counts", [(3, 2), (700, 5), (600, 900)])
def test_sums_are_joined_in_the_form_that_their_rows_have_together(counts: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, WIDTH, generator=generator) for n in counts]
    sums = [GramSum(WIDTH) for _ in rows]
    for one, own in zip(sums, rows, strict=True):
        one.add(own)
    sums[0].join(sums[1].state())
    assert sums[0].count == sum(counts)
    together = torch.cat(rows).double()
    found = sums[0].tensors()
    assert ("factor" in found) == (sum(counts) < WIDTH)
    gram = found["gram"] if "gram" in found else found["factor"].T @ found["factor"]
    torch.testing.assert_close(gram, together.T @ together, atol=1e-3, rtol=1e-5)


def test_states_of_workers_and_of_one_process_are_told_apart() -> None:
    one = {"a/gram/count": torch.tensor(1)}
    assert sharded_pass.states_of(one) == [one]
    two = {f"shard-{n:04}/{k}": v for n in (1, 0) for k, v in one.items()}
    assert sharded_pass.states_of(two) == [one, one]
