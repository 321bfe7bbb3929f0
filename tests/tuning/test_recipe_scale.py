"""`scale` in recipes: numbers, auto, searches, and their faults with lines."""

from __future__ import annotations

import pytest

from eutectic.errors import RecipeError
from eutectic.recipes.load import load_recipe
from eutectic.recipes.schema import ScaleSearch

TEXT = """base: ./base
experts: {a: ./a}
method: iso_c
scale: SCALE
"""


def loaded(folder, scale):
    for name in ("base", "a"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "tasks.yaml").write_text("tasks: {}")
    (folder / "recipe.yaml").write_text(TEXT.replace("SCALE", scale))
    return load_recipe(folder / "recipe.yaml")[0].scale


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.3", 1.3),
        ("'1.3'", 1.3),
        ("null", None),
        ("auto", ScaleSearch(search="gram")),
        ("{search: gram}", ScaleSearch(search="gram")),
    ],
)
def test_what_a_scale_may_be(tmp_path, text, value):
    assert loaded(tmp_path, text) == value


def test_tasks_start_at_the_recipe(tmp_path):
    scale = loaded(tmp_path, "{search: validation, tasks: tasks.yaml, range: [0.1, 2], points: 7}")
    assert scale.tasks == str(tmp_path / "tasks.yaml")
    assert (scale.range, scale.points, scale.tolerance) == ((0.1, 2.0), 7, 0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("auot", "line 4: scale: a scale is a number, auto, norm, or {search: …, tasks: …}"),
        (".inf", "line 4: scale: should be a finite number"),
        ("{search: grid, tasks: tasks.yaml}", "scale.search: should be 'validation', 'divergence'"),
        ("{search: validation}", "search: validation needs tasks"),
        ("{search: gram, points: 5}", "search: gram is a closed form and takes no points"),
        ("{search: divergence, tasks: none.yaml}", "line 4: scale.tasks: no such file: none.yaml"),
        ("{search: divergence, tasks: tasks.yaml, rage: 1}", "'scale.rage'. Did you mean 'range'?"),
        ("{search: divergence, tasks: tasks.yaml, range: [2, 1]}", "range is [smallest, largest]"),
        ("{search: divergence, tasks: tasks.yaml, range: [0, 1]}", "scale.range.0: should be grea"),
        (
            "{search: divergence, tasks: tasks.yaml, tolerance: 1}",
            "scale.tolerance: should be",
        ),
        (
            "{search: validation, tasks: tasks.yaml, compare: features}",
            "takes no compare",
        ),
    ],
)
def test_faults(tmp_path, text, message):
    with pytest.raises(RecipeError) as caught:
        loaded(tmp_path, text)
    assert message in str(caught.value) and len(caught.value.faults) == 1
