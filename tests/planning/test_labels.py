"""Heads of one shape whose classes are ordered differently: warned of where they are merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eutectic.execution.model_card import written
from eutectic.planning.inputs import open_inputs
from eutectic.planning.notes import class_names
from eutectic.planning.plan import make_plan
from eutectic.recipes.load import check_recipe
from helpers.cli import invoke
from helpers.folders import save

ORDER = {"0": "negative", "1": "neutral", "2": "positive"}
OTHER = {"0": "negative", "1": "positive", "2": "neutral"}
MADE_UP = {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
RULE = {"match": "model.classifier.*", "treatment": "head"}


def models(folder: Path, **labels: dict[str, str]) -> dict[str, Any]:
    """Save a base and experts with one head each, and return what a recipe says of them."""
    for name, names in labels.items():
        tensors = {
            "model.classifier.out.weight": torch.ones(3, 4),
            "model.classifier.out.bias": torch.ones(3),
            "model.layer.weight": torch.ones(4, 4),
            "model.layer.bias": torch.ones(3),
        }
        save(folder / name, tensors, {"model_type": "bert", "id2label": names})
    experts = {name: str(folder / name) for name in labels if name != "base"}
    return {"base": str(folder / "base"), "experts": experts, "method": "average"}


def warnings(stated: dict[str, Any], **more: Any) -> list[str]:
    recipe = check_recipe({**stated, **more})
    with open_inputs(recipe) as inputs:
        notes = make_plan(recipe, inputs).notes
        # The values are all the same, which is a warning of its own.
        return [str(n) for n in notes if n.kind == "mixed_classes"]


def test_other_orders_are_named_with_what_to_do(tmp_path: Path) -> None:
    stated = models(tmp_path, base=ORDER, a=ORDER, b=OTHER, c=MADE_UP)
    (text,) = warnings(stated)
    assert "than those of the base: 'b' (output 1 is positive, not neutral). " in text
    assert text.endswith("tensors: [{match: model.classifier.*, treatment: head}]")
    assert warnings(stated, tensors=[RULE]) == []
    for treatment in ("copy", "head"):
        rules = [{"match": "*classifier*", "treatment": treatment}]
        assert warnings(stated, tensors=rules, heads="base") == []
    # The classes of the output are those of the config.json that it takes.
    (text,) = warnings(stated, side_files="b")
    assert "than those of 'b': the base (output 1 is neutral, not positive), 'a' (" in text


@pytest.mark.parametrize("base", [ORDER, MADE_UP])
def test_equal_orders_and_made_up_names_are_fine(tmp_path: Path, base: dict[str, str]) -> None:
    shouted = {i: name.upper() for i, name in ORDER.items()}
    assert warnings(models(tmp_path, base=base, a=ORDER, b=shouted, c=MADE_UP)) == []


def test_experts_are_compared_where_the_base_names_no_classes(tmp_path: Path) -> None:
    (text,) = warnings(models(tmp_path, base=MADE_UP, a=ORDER, b=OTHER))
    assert "than those of 'a': 'b' (output 1 is positive, not neutral)" in text


def test_classes_that_are_not_the_heads_are_no_reason(tmp_path: Path) -> None:
    fewer = {"0": "no", "1": "yes"}
    assert warnings(models(tmp_path, base=ORDER, a=ORDER, b=fewer)) == []


@pytest.mark.parametrize("config", [
    {}, {"id2label": None}, {"id2label": ["a", "b"]}, {"id2label": {"0": "a", "2": "b"}},
    {"id2label": {"zero": "a", "one": "b"}}, {"id2label": {"0": "points"}},
    {"id2label": MADE_UP}, {"label2id": {"a": None, "b": 1}},
])  # fmt: skip
def test_what_names_no_classes(config: dict[str, Any]) -> None:
    assert class_names(config) is None


def test_label2id_stands_in_for_id2label() -> None:
    assert class_names({"label2id": {"B": 1, "a": 0}}) == ("a", "b")


def test_the_command_line_warns_on_stderr(tmp_path: Path) -> None:
    stated = models(tmp_path, base=ORDER, a=ORDER, b=OTHER)
    (text,) = warnings(stated)
    words = ["--base", stated["base"], "-m", "average"]
    words += [f"{name}={path}" for name, path in stated["experts"].items()]
    for verb in (["plan"], ["merge", "-o", tmp_path / "out"], ["merge", "-o", tmp_path / "json"]):
        answer = invoke(*verb, *words, *(["--json"] if "json" in str(verb[-1]) else []))
        assert answer.code == 0, answer.err
        assert text in answer.err
    assert text in json.loads(answer.out)["notes"]
    made = json.loads((tmp_path / "out" / "eutectic.json").read_text())
    assert text in made["notes"]
    assert written(text) in (tmp_path / "out" / "README.md").read_text()
