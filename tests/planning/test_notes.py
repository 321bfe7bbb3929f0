"""What a plan tells beside its table: statistics of unknown origin, rules without effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import eutectic
from eutectic.errors import RecipeError
from eutectic.planning.inputs import in_memory_inputs
from eutectic.planning.plan import make_plan
from eutectic.recipes.load import check_recipe
from eutectic.types import LayerStatistics, Statistics, StatisticsInMemory
from helpers.folders import save

BASE = {"layer.weight": torch.zeros(4, 3), "layer.bias": torch.zeros(4)}
EXPERT = {
    "layer.weight": torch.ones(4, 3),
    "layer.bias": torch.ones(4),
    "classifier.weight": torch.ones(2, 4),
}
LAYER = LayerStatistics(gram=torch.eye(3), count=5)


def notes(statistics: Statistics | dict[str, LayerStatistics], **keys: object) -> str:
    inputs = in_memory_inputs(BASE, {"a": EXPERT}, {"a": statistics})
    values = {"base": "memory", "experts": {"a": "memory"}, "method": "regmean", **keys}
    return "\n".join(map(str, make_plan(check_recipe(values), inputs).notes))


def test_statistics_of_unknown_origin_are_named() -> None:
    known = StatisticsInMemory({"layer.weight": LAYER}, fingerprint="of another checkpoint")
    assert "do not prove that they are of this expert" in notes(known)
    assert "of this expert" not in notes({"layer.weight": LAYER})


def test_rules_that_match_nothing_are_named() -> None:
    rules = [{"match": m, "treatment": "head"} for m in ("*classifier*", "*typo*")]
    text = notes({"layer.weight": LAYER}, tensors=rules)
    assert "rules that match no tensor: *typo*" in text


def test_a_method_without_its_statistics_says_what_to_do() -> None:
    inputs = in_memory_inputs(BASE, {"a": EXPERT}, {})
    values = {"base": "memory", "experts": {"a": "memory"}, "fallback": "allow"}
    for method, rule in (("esm", "tsv_m"), ("regmean", "regmean's own rule for such tensors")):
        text = "\n".join(
            map(str, make_plan(check_recipe({**values, "method": method}), inputs).notes)
        )
        assert f"without statistics, merged by {rule}: layer.weight" in text
        assert f"{method} needs them: collect them (eutectic collect)" in text
    assert "eutectic collect" not in notes({"layer.weight": LAYER})


def test_statistics_of_the_wrong_kind_say_what_to_collect() -> None:
    inputs = in_memory_inputs(BASE, {"a": EXPERT}, {"a": {"layer.weight": LAYER}})
    values = {"base": "memory", "experts": {"a": "memory"}, "method": "mats"}
    values["fallback"] = "allow"

    def text(operator: str) -> str:
        recipe = check_recipe({**values, "parameters": {"operator": operator}})
        return "\n".join(map(str, make_plan(recipe, inputs).notes))

    wanted = "the statistics of 'a' hold no output_gradient_gram at all: collect them with --output"
    assert wanted in text("kfac")
    assert "at all" not in text("gram")


def test_an_initial_merge_that_is_nothing_is_a_fault_of_the_recipe(tmp_path: Path) -> None:
    save(tmp_path / "base", BASE)
    save(tmp_path / "a", EXPERT)
    recipe = {"base": tmp_path / "base", "experts": {"a": tmp_path / "a"}, "method": "mats"}
    with pytest.raises(RecipeError, match="init 'iso_d' is no method.* Did you mean 'iso_c'"):
        eutectic.merge({**recipe, "parameters": {"init": "iso_d"}}, output=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
