"""Recipes, tasks and data, damaged or hostile: accepted or refused, never a traceback."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.helpers.fuzzing import damaged, documents, mutated, outcome, values

from eutectic.cli.options import RecipeOptions
from eutectic.cli.recipe_request import request
from eutectic.data.images import open_image
from eutectic.data.row_files import read_rows
from eutectic.errors import RecipeError, StatisticsError, TaskError
from eutectic.evaluation.task_files import load_tasks
from eutectic.execution.executors import limits_of
from eutectic.recipes.load import check_recipe, load_recipe

CASES = settings(max_examples=500)
RECIPE: dict[str, Any] = {
    "base": "base",
    "experts": {"a": "a", "b": {"path": "b", "weight": 0.5, "statistics": "s"}},
    "method": "ties",
    "parameters": {"density": 0.5},
    "scale": {"search": "validation", "tasks": "tasks.yaml", "range": [0.1, 2], "points": 5},
    "tensors": [{"match": "*.w", "treatment": "copy", "split": [1, 2], "scale": 1.0}],
    "dtype": "float32",
    "seed": 1,
    "shard_size": "5GB",
    "heads": "base",
    "side_files": "a",
}
TASKS: dict[str, Any] = {
    "tasks": {
        "sst2": {
            "kind": "text-classification",
            "data": {"test": "rows.jsonl", "proxy": {"path": "rows.jsonl", "share": 0.5}},
            "columns": {"text": "sentence", "label": "label"},
            "metric": "accuracy",
            "labels": ["no", "yes"],
            "max_length": 12,
            "head": "head.safetensors",
        },
        "own": {"kind": "function", "function": "f.py:g", "options": {"a": 1}},
        "lm": {"kind": "lm-eval", "harness": {"tasks": ["piqa"], "limit": 3}},
    }
}


def as_yaml(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()  # JSON is YAML, and made faster


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    for name in ("base", "a", "b"):
        (folder / name).mkdir()
    for name in ("s", "tasks.yaml", "rows.jsonl", "head.safetensors", "f.py"):
        (folder / name).write_text("{}")
    return folder


@CASES
@given(st.one_of(mutated(RECIPE).map(as_yaml), damaged(as_yaml(RECIPE))))
def test_recipes(place: Path, text: bytes) -> None:
    (place / "recipe.yaml").write_bytes(text)
    outcome(lambda: load_recipe(place / "recipe.yaml"))


@CASES
@given(mutated(RECIPE))
def test_recipes_from_python(value: Any) -> None:
    outcome(lambda: check_recipe(value))


@CASES
@given(st.one_of(mutated(TASKS).map(as_yaml), damaged(as_yaml(TASKS))))
def test_tasks(place: Path, text: bytes) -> None:
    (place / "tasks.yaml").write_bytes(text)
    outcome(lambda: load_tasks(place / "tasks.yaml"))


@CASES
@given(st.lists(st.one_of(st.text(max_size=12), values.map(str)), min_size=1, max_size=3))
def test_words_of_a_command_line(words: list[str]) -> None:
    asked = RecipeOptions(what=["a=x", *words], base="b", method="average", set_=words, param=words)
    outcome(lambda: request(asked))


ROWS = [{"text": "a b", "label": 1, "n": 0.5}, {"text": 'é "q"', "label": "no", "n": None}]
LINES = b"\n".join(json.dumps(row).encode() for row in ROWS)
TABLE = b'text,label\n"a, b",1\n"two\nlines",0\n'


@CASES
@given(st.data())
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv"])
def test_rows(place: Path, ending: str, data: st.DataObject) -> None:
    valid = {"jsonl": LINES, "json": json.dumps(ROWS).encode(), "csv": TABLE}.get(ending, TABLE)
    drawn = damaged(valid) if ending != "json" else st.one_of(documents(ROWS), damaged(valid))
    path = place / f"rows.{ending}"
    path.write_bytes(data.draw(drawn))
    outcome(lambda: read_rows(str(path)))


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7)).save(file, "png")
    return file.getvalue()


@CASES
@given(damaged(picture()))
def test_pictures(raw: bytes) -> None:
    outcome(lambda: open_image(raw))


def test_a_picture_of_too_many_pixels_is_refused() -> None:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "png")
    with pytest.raises(StatisticsError, match="400000000 pixels|400,000,000|20,000"):
        open_image(file.getvalue())


REFUSED = {
    "aliases that multiply": (
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "\n".join(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]" for i in range(1, 10)),
        "aliases expand beyond the limit of 200,000 values",
    ),
    "an alias of itself": ("a: &a [*a]", "an alias is part of itself"),
    "merge keys that multiply": (
        "a0: &a0 {x: 1, y: 2}\n"
        + "\n".join(
            f"a{i}: &a{i} {{<<: [" + ", ".join([f"*a{i - 1}"] * 9) + "]}" for i in range(1, 10)
        ),
        "aliases expand",
    ),
    "brackets": ("[" * 100_000, "nested more than 50 levels deep"),
    "ten megabytes": ("#" * 10_000_000, "10,000,000 bytes, the limit is 1,048,576"),
    "an integer of 5,000 digits": ("seed: " + "1" * 5000, "5,000 digits, the limit is 300"),
    "a tag": ("a: !!python/object/apply:os.system [ls]", "the tag .* is not understood"),
    "half of a pair": ('a: "\\ud800"', "invalid Unicode|half of a pair"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bounds_are_named_in_no_time(tmp_path: Path, case: str) -> None:
    text, message = REFUSED[case]
    (tmp_path / "d.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "d.yaml")
    with pytest.raises(TaskError, match=message):
        load_tasks(tmp_path / "d.yaml")
    assert time.process_time() - started < 6


def test_many_rules_and_classes_are_refused_with_the_bound(place: Path) -> None:
    rules = [{"match": f"a{i}", "scale": 1} for i in range(20_000)]
    (place / "recipe.yaml").write_bytes(as_yaml({**RECIPE, "tensors": rules}))
    with pytest.raises(RecipeError, match="at most 1000 items"):
        load_recipe(place / "recipe.yaml")
    task = {**TASKS["tasks"]["sst2"], "labels": list(range(100_000))}
    (place / "many.yaml").write_bytes(as_yaml({"tasks": {"a": task}}))
    with pytest.raises(TaskError, match="the limit is"):
        load_tasks(place / "many.yaml")


def test_dates_are_texts(place: Path) -> None:
    text = "base: base\nmethod: average\nexperts: {2024-02-30: a}\n"
    (place / "dated.yaml").write_text(text)
    assert list(load_recipe(place / "dated.yaml")[0].experts) == ["2024-02-30"]


def test_threads_are_bounded() -> None:
    assert outcome(lambda: limits_of(1_000_000)) == "refused"
    assert outcome(lambda: limits_of(4)) == "accepted"
