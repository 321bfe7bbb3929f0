"""Guards configurations that are wrong in any way: they are refused, and nothing else is raised."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from eutectic.errors import RecipeError
from eutectic.recipes.load import load_recipe
from eutectic.recipes.mergekit_stages import check_stages, read_stages

DOCUMENTS: list[list[dict[str, Any]]] = [
    [
        {
            "models": [
                {"model": "a", "parameters": {"weight": [0, 1], "density": 0.5}},
                {"model": "b+lora", "parameters": {"weight": [{"filter": "mlp", "value": 1}]}},
            ],
            "merge_method": "ties",
            "base_model": "base",
            "parameters": {"normalize": True, "weight": 1},
            "dtype": "bfloat16",
            "tokenizer": {"source": "union", "tokens": {"x": {"source": {"kind": "zero"}}}},
            "chat_template": "auto",
        }
    ],
    [
        {
            "name": "one",
            "slices": [
                {
                    "sources": [
                        {"model": "a", "layer_range": [0, 2]},
                        {"model": "base", "layer_range": [1, 3]},
                    ],
                    "base_model": "base",
                    "parameters": {"t": [0, 1]},
                }
            ],
            "merge_method": "slerp",
        },
        {"merge_method": "karcher", "models": [{"model": "one"}, {"model": "b"}]},
    ],
    [
        {
            "base": "base",
            "experts": {"a": {"path": "a", "weight": [1, 2], "adapter": "lora"}, "b": "b"},
            "method": "ties",
            "parameters": {"density": [{"match": "*", "value": [0, 1]}]},
            "layers": [{"a": [0, 1]}, {"take": {"b": [1, 2]}, "weights": {"b": [1]}}],
            "tensors": [{"match": "*", "method": "slerp", "parameters": {"t": [0, 1]}}],
        }
    ],
]
ODD = (
    *(None, 0, -1, 1.5, float("nan"), float("inf"), "", "x", "a+b+c", [], [1], [[1]], {}, True),
    *({"value": 1}, {"filter": 3, "value": [{}]}, [True, "a"], "1e400", "*", ["a", 1]),
    *({"model": {"path": "a"}}, [0, 10**30], "@", "a@b@c"),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything inside of a document."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def mutated(chance: random.Random, document: dict[str, Any]) -> dict[str, Any]:
    """Return a document with up to three values replaced, moved to another key, or left out."""
    found = copy.deepcopy(document)
    for _ in range(chance.randint(1, 3)):
        known = list(places(found))
        if not known:
            break
        *outer, last = chance.choice(known)
        place = found
        for step in outer:
            place = place[step]
        kind = chance.random()
        if kind < 0.6:
            place[last] = copy.deepcopy(chance.choice(ODD))
        elif kind < 0.8 and isinstance(place, dict):
            key = chance.choice(["wieght", "models", "slices", "parameters", "layer_range", 5])
            place[key] = place.pop(last)
        elif isinstance(place, dict):
            del place[last]
    return found


@pytest.mark.parametrize("seed", range(4))
def test_any_mutation_is_a_recipe_or_refused(tmp_path: Path, seed):
    for name in ("base", "a", "b", "lora"):
        (tmp_path / name).mkdir()
    path = tmp_path / "recipe.yml"
    chance = random.Random(seed)
    for _ in range(60):
        documents = [mutated(chance, document) for document in chance.choice(DOCUMENTS)]
        path.write_text("---\n".join(map(yaml.safe_dump, documents)))
        try:
            stages = read_stages(path)
            check_stages(stages, tmp_path / "out", {}) if stages else load_recipe(path)
        except RecipeError as error:
            assert error.faults
