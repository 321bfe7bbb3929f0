"""Guards what a recipe may say: defaults, ranges, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from eutectic.recipes.schema import Recipe, TensorRule
from eutectic.types import Treatment


def recipe(**more: Any) -> Recipe:
    values = {"base": "b", "experts": {"x": "p"}, "method": "average", **more}
    return Recipe.model_validate(values)


def test_defaults():
    made = recipe()
    assert made.scale is None and made.scale_tensors == "all"
    assert made.dtype is None and made.seed == 0 and made.precision == "fast"
    assert made.heads == "per_expert" and made.missing == "error" and made.nonfinite == "error"
    assert made.tensors == () and made.parameters == {} and made.side_files == "base"


def test_an_expert_may_be_a_path_alone():
    made = recipe(experts={"a": "./a", "b": {"path": "./b", "weight": 0.5}})
    assert made.experts["a"].path == "./a" and made.experts["a"].weight == 1.0
    assert made.experts["b"].weight == 0.5


def test_a_recipe_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        recipe().method = "ties"


@pytest.mark.parametrize("name", ["sst2", "a-b", "a.b", "a_b", "a+b", "7b"])
def test_names_of_experts(name):
    assert name in recipe(experts={name: "p"}).experts


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "..", "a b", "é", "a\n"])
def test_names_that_are_no_folder_names_are_refused(name):
    with pytest.raises(ValidationError):
        recipe(experts={name: "p"})


@pytest.mark.parametrize(
    "more",
    [
        {"experts": {}},
        {"experts": ["p"]},
        {"experts": {"x": {}}},
        {"experts": {"x": {"path": "p", "weight": float("nan")}}},
        {"scale": float("inf")},
        {"seed": -1},
        {"dtype": "int8"},
        {"heads": "keep"},
        {"scales": 1.0},
    ],
)
def test_refusals(more):
    with pytest.raises(ValidationError):
        recipe(**more)


@pytest.mark.parametrize("split", [2, 3, [4, 4, 8]])
def test_splits(split):
    assert TensorRule(match="*", split=split).split == split


@pytest.mark.parametrize("split", [0, 1, [], [4], [4, 0], "3x", 2.5])
def test_splits_that_are_none(split):
    with pytest.raises(ValidationError):
        TensorRule.model_validate({"match": "*", "split": split})


def test_a_rule_that_says_nothing_is_refused():
    with pytest.raises(ValidationError, match="the rule says nothing"):
        TensorRule(match="*")


def test_a_rule_may_say_one_thing():
    assert TensorRule(match="*", scale=0.5).treatment is None
    assert (
        TensorRule.model_validate({"match": "*", "treatment": "copy"}).treatment is Treatment.COPY
    )
