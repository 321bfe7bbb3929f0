"""What a plan tells beside its table: statistics of unknown origin, rules without effect."""

from __future__ import annotations

import torch

from eutectic.planning.inputs import in_memory_inputs
from eutectic.planning.plan import make_plan
from eutectic.recipes.load import check_recipe
from eutectic.types import LayerStatistics

BASE = {"layer.weight": torch.zeros(4, 3), "layer.bias": torch.zeros(4)}
EXPERT = {
    "layer.weight": torch.ones(4, 3),
    "layer.bias": torch.ones(4),
    "classifier.weight": torch.ones(2, 4),
}
LAYER = LayerStatistics(gram=torch.eye(3), count=5)


class Collected(dict[str, LayerStatistics]):
    """Statistics that know their checkpoint."""

    fingerprint = "of another checkpoint"


def notes(statistics: dict[str, LayerStatistics], **keys: object) -> str:
    inputs = in_memory_inputs(BASE, {"a": EXPERT}, {"a": statistics})
    values = {"base": "memory", "experts": {"a": "memory"}, "method": "regmean", **keys}
    return "\n".join(make_plan(check_recipe(values), inputs).notes)


def test_statistics_of_unknown_origin_are_named() -> None:
    assert "do not prove that they are of this expert" in notes(Collected({"layer.weight": LAYER}))
    assert "of this expert" not in notes({"layer.weight": LAYER})


def test_rules_that_match_nothing_are_named() -> None:
    rules = [{"match": m, "treatment": "head"} for m in ("*classifier*", "*typo*")]
    text = notes({"layer.weight": LAYER}, tensors=rules)
    assert "rules that match no tensor: *typo*" in text


def test_a_method_without_its_statistics_says_what_to_do() -> None:
    inputs = in_memory_inputs(BASE, {"a": EXPERT}, {})
    values = {"base": "memory", "experts": {"a": "memory"}}
    for method, rule in (("esm", "tsv_m"), ("regmean", "regmean's own rule for such tensors")):
        text = "\n".join(make_plan(check_recipe({**values, "method": method}), inputs).notes)
        assert f"without statistics, merged by {rule}: layer.weight" in text
        assert f"{method} needs them: collect them (eutectic collect)" in text
    assert "eutectic collect" not in notes({"layer.weight": LAYER})
