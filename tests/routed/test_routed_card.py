"""What a routed folder says of itself: its card, its router's quality, what is not routed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from eutectic.models.sites import routable_sites
from eutectic.routed import RouterQuality, load_routed, router_quality
from eutectic.routed.routed_card import routed_card
from eutectic.routed.routed_layers import choose_layers, layer_kinds, unrouted_layers
from eutectic.statistics import collect
from helpers.cli import invoke
from routed.world import EXPERTS, World, bert

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def world() -> World:
    return bert()


def build(world: World, **options: Any) -> Any:
    of_experts, of_router = world.statistics(False), world.statistics(True)
    return eutectic.build_routed(
        world.merged, {n: m.state_dict() for n, m in world.experts.items()}, of_experts, of_router,
        rank=4, statistics_of="any", **options,
    )  # fmt: skip


def data(world: World) -> dict[str, Any]:
    return {n: [world.batch(t, 30, 5)] for t, n in enumerate(EXPERTS)}


def test_quality_is_kept_with_the_model(world: World, tmp_path: Path) -> None:
    routed = build(world)
    found = router_quality(routed, data(world))
    routed.routing.quality = found.record()
    routed.save_pretrained(tmp_path / "routed")
    kept = json.loads((tmp_path / "routed" / "routed.json").read_text())["quality"]
    assert kept == found.record() and set(kept["layers"]) == set(found.layers)
    again = RouterQuality.from_record(load_routed(tmp_path / "routed").routing.quality)
    assert again == found
    build(world).save_pretrained(tmp_path / "unknown")
    assert load_routed(tmp_path / "unknown").routing.quality is None


def test_confusion_is_the_share_of_each_expert(world: World) -> None:
    routed = build(world)
    found = router_quality(routed, data(world))
    for name, row in found.confusion.items():
        assert sum(row.values()) == pytest.approx(1)
        assert row[name] == found.decisions[name]
    with eutectic.routing(routed, record=True) as votes:
        routed(**world.batch(0, 30, 5))
    last = list(votes.values())[-1]  # evidence adds up over the layers
    for t, name in enumerate(EXPERTS):
        assert found.confusion["a"][name] == pytest.approx(float((last == t).double().mean()))


def test_what_is_not_routed_is_listed(world: World) -> None:
    chosen = choose_layers(world.merged)
    others = unrouted_layers(world.merged, chosen)
    assert {s.name for s in routable_sites(world.merged)} == {s.name for s in chosen} | {*others}
    assert "encoder.layer.*.output.dense.weight" in layer_kinds(others)
    assert unrouted_layers(build(world)) == others
    every = build(world, layers=["*"])
    assert unrouted_layers(every) == []


def test_at_full_rank_only_what_is_routed_is_the_expert(world: World) -> None:
    """An expert that differs in matrices alone is met where all of them are routed."""
    expert, batch = world.experts["a"], world.batch(0, 6, 5)
    alike = {n: t.clone() for n, t in world.merged.state_dict().items()}
    names = {s.name for s in routable_sites(world.merged)}
    alike |= {n: t for n, t in expert.state_dict().items() if n in names}
    own = type(expert)(expert.config).eval()
    own.load_state_dict(alike)
    statistics = {"a": collect(own, [world.batch(t, 60, s) for t in range(3) for s in (5, 6)])}

    def difference(layers: list[str] | None) -> float:
        routed = eutectic.build_routed(
            world.merged, {"a": alike}, statistics, rank=10_000, layers=layers,
            statistics_of="any", router="prototype",
        )  # fmt: skip
        with torch.no_grad():
            return float((routed(**batch)[0] - own(**batch)[0]).norm() / own(**batch)[0].norm())

    assert difference(["*"]) < 1e-5 and difference(None) > 1e-3


def test_route_writes_a_card_and_shows_what_it_kept(world: World, tmp_path: Path) -> None:
    world.merged.save_pretrained(tmp_path / "merged")
    words: list[Any] = ["route", tmp_path / "merged", "--rank", 2]
    for t, (name, model) in enumerate(world.experts.items()):
        model.save_pretrained(tmp_path / name)
        collect(model, [world.batch(t, 40, 1)], tmp_path / f"{name}.stats")
        words += [tmp_path / name, "-s", f"{name}={tmp_path / name}.stats"]
    dry = invoke(*words, "--dry-run")
    assert "encoder.layer.*.output.dense.weight – 2" in dry.out and "not routed" in dry.out
    built = invoke(*words, "-o", tmp_path / "routed", "--statistics-of", "any")
    assert built.code == 0, built.err
    assert "encoder.layer.*.attention.self.query.weight 2 –" in built.out
    card = (tmp_path / "routed" / "README.md").read_text()
    assert "eutectic.load_routed" in card and "encoder.layer.*.output.dense.weight` (2)" in card
    assert "estimated from its statistics" in card and str(tmp_path) not in card
    shown = invoke("route", tmp_path / "routed")
    assert "estimated from its statistics" in shown.out and "decision" not in built.err
    record = json.loads(invoke("route", tmp_path / "routed", "--json").out)
    assert record["router_quality"]["samples"] == dict.fromkeys(EXPERTS, 40)
    assert record["not_routed"] and set(record["routed"]) == {
        name for name in record["router_quality"]["layers"]
    }


def test_names_in_a_card_are_only_names(world: World) -> None:
    names = {"a": "x` <script>|", "b": "b", "c": "c"}
    experts = {names[n]: m.state_dict() for n, m in world.experts.items()}
    routed = eutectic.build_routed(
        world.merged, experts, {names[n]: s for n, s in world.statistics(True).items()},
        rank=2, statistics_of="any",
    )  # fmt: skip
    card = routed_card(routed, "mit")
    assert "license: mit" in card.split("---")[1]
    assert "<script>" not in card.split("```")[0] and "x` " not in card.split("```")[1]
    assert card.count("```") == 2
