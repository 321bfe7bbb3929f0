"""Router quality: shares sent to the own expert, by decisions on data or by statistics alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eutectic.errors import RequestError
from eutectic.routed import build_routed, estimated_quality, router_quality, routing
from eutectic.statistics import collect
from helpers.cli import invoke

from .world import EXPERTS, World, bert

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def world() -> World:
    return bert()


def build(world: World, **options: Any) -> Any:
    states, own = world.state_dicts(), world.statistics()
    return build_routed(world.merged, states, own, world.statistics(True), rank=4, **options)


@pytest.mark.parametrize("router", ["discriminant", "prototype"])
def test_shares_are_those_of_the_decisions(world: World, router: str):
    routed = build(world, router=router)
    data = {n: [world.batch(t, 5, 7), world.batch(t, 3, 8)] for t, n in enumerate(EXPERTS)}
    found = router_quality(routed, data)
    assert found.measured and found.samples == dict.fromkeys(EXPERTS, 8)
    for t, name in enumerate(EXPERTS):
        layers: dict[str, list[int]] = {}
        for batch in data[name]:
            with torch.no_grad(), routing(routed, record=True) as votes:
                routed(**batch)
            for layer, chosen in votes.items():
                layers.setdefault(layer, []).extend(chosen.tolist())
        assert {layer: row[name] for layer, row in found.layers.items()} == {
            layer: sum(c == t for c in chosen) / 8 for layer, chosen in layers.items()
        }
        rows = list(layers.values())
        if router == "discriminant":  # evidence adds up
            decided = rows[-1]
        else:
            decided = [max(range(3), key=[r[i] for r in rows].count) for i in range(8)]
        assert found.decisions[name] == sum(c == t for c in decided) / 8
    assert list(found.blocks()) == ["encoder.layer.0", "encoder.layer.1"]
    block = [row["a"] for layer, row in found.layers.items() if ".layer.1." in layer]
    assert found.blocks()["encoder.layer.1"]["a"] == pytest.approx(sum(block) / len(block))


def test_no_more_samples_than_asked(world: World):
    data = {n: [world.batch(t, 4, 7)] * 9 for t, n in enumerate(EXPERTS)}
    assert router_quality(build(world), data, most=6).samples == dict.fromkeys(EXPERTS, 8)
    with pytest.raises(RequestError, match="unknown expert 'z'"):
        router_quality(build(world), {"z": []})
    with pytest.raises(RequestError, match="no sample"):
        router_quality(build(world), {"a": []})


def test_an_estimate_is_that_of_gaussian_inputs(world: World):
    """Against draws in the layer's own space, with the moments of the statistics."""
    routed, statistics = build(world, accumulate=False), world.statistics(True)
    found = estimated_quality(routed, statistics)
    assert found is not None and not found.measured
    layer = "encoder.layer.1.intermediate.dense.weight"
    router = routed.get_submodule(layer.removesuffix(".weight")).experts.router
    for t, name in enumerate(EXPERTS):
        entry = statistics[name][layer]
        mean = entry.pooled_sum / entry.sample_count
        scatter = entry.pooled_gram - torch.outer(entry.pooled_sum, mean)
        values, vectors = torch.linalg.eigh(scatter / (entry.sample_count - 1))
        root = vectors * values.clamp(min=0).sqrt()
        draws = torch.randn(20_000, len(mean), generator=torch.Generator().manual_seed(3)).double()
        scores = router((mean + draws @ root.T).float())
        share = float((scores.argmax(-1) == t).double().mean())
        assert found.layers[layer][name] == pytest.approx(share, abs=0.03)
    assert found.decisions["a"] == pytest.approx(
        sum(row["a"] for row in found.layers.values()) / len(found.layers)
    )
    plain = {
        n: {k: type(v)(gram=v.gram, count=v.count, input_sum=v.input_sum) for k, v in own.items()}
        for n, own in statistics.items()
    }
    assert estimated_quality(build(world, router="prototype"), plain) is None


def test_what_is_near_chance_is_warned_of(world: World):
    """All tasks of the same inputs: nothing tells them apart."""
    same = {n: [world.batch(0, 30, 7)] for n in EXPERTS}
    found = router_quality(build(world), same)
    note = found.note()
    assert note is not None and note.level == "warning"
    assert set(note.subject) >= {"b", "c"} and "by chance 33%" in note.text
    apart = {n: [world.batch(t, 30, 1)] for t, n in enumerate(EXPERTS)}
    assert router_quality(build(world), apart).note() is None


def test_route_prints_it(world: World, tmp_path: Path):
    world.merged.save_pretrained(tmp_path / "merged")
    words: list[Any] = ["route", tmp_path / "merged", "--rank", 2]
    for t, (name, model) in enumerate(world.experts.items()):
        model.save_pretrained(tmp_path / name)
        collect(model, [world.batch(t, 30, 1)], tmp_path / f"{name}.stats")
        # The same data for all: the router has nothing to go by.
        collect(world.merged, [world.batch(0, 30, 1 + t)], tmp_path / f"{name}.merged")
        words += [f"{name}={tmp_path / name}", "-s", f"{name}={tmp_path / name}.stats"]
    apart = invoke(*words, "-o", tmp_path / "apart")
    assert apart.code == 0 and "Samples sent to their own expert, estimated" in apart.out
    assert "encoder.layer.1" in apart.out and "warning" not in apart.err
    for name in EXPERTS:
        words += ["--router-statistics", f"{name}={tmp_path / name}.merged"]
    blind = invoke(*words, "-o", tmp_path / "blind", "--json")
    assert "warning: the router sends few samples" in blind.err
    quality = json.loads(blind.out)["router_quality"]
    assert quality["chance"] == pytest.approx(1 / 3) and len(quality["layers"]) == 10
