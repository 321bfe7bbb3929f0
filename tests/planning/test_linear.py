"""Plans of many tensors take time in proportion to their number."""

from __future__ import annotations

import cProfile
import pstats
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eutectic.planning.inputs import open_inputs
from eutectic.planning.plan import make_plan
from eutectic.recipes.load import check_recipe
from eutectic.words import public_path

G = torch.Generator().manual_seed(0)


def tables(count: int, name: str) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{i}.embed_tokens.weight": torch.randn(50, 8, generator=G) for i in range(count)
    }


@pytest.mark.parametrize("extra", [0, 300])
def test_equal_shaped_tables_are_not_compared_pair_by_pair(tmp_path: Path, extra: int) -> None:
    base = tables(1500, "m")
    base["m.1.embed_tokens.weight"] = base["m.0.embed_tokens.weight"].clone()
    for folder, further in (("base", {}), ("a", tables(extra, "x"))):
        (tmp_path / folder).mkdir()
        save_file(base | further, tmp_path / folder / "model.safetensors")
    values = {"base": str(tmp_path / "base"), "experts": {"a": str(tmp_path / "a")}}
    recipe = check_recipe({**values, "method": "average", "unmatched": "leave"})
    started = time.process_time()
    with open_inputs(recipe) as inputs:
        plan = make_plan(recipe, inputs)
    assert time.process_time() - started < 10
    tied = [t.name for t in plan.tensors if "tied to" in t.why]
    assert tied == ["m.1.embed_tokens.weight"]


def test_calls_grow_as_tensors_and_experts_do(tmp_path: Path) -> None:
    """Counted, not timed; files of one program, whose headers are alike, and of several."""

    def calls(tensors: int, experts: int, alike: bool) -> int:
        place = tmp_path / f"{tensors}-{experts}-{alike}"
        for index in range(experts + 1):
            (place / str(index)).mkdir(parents=True)
            held = {f"layers.{i}.proj.weight": torch.full((2, 2), index) for i in range(tensors)}
            metadata = {"format": "pt"} if alike else {"format": "pt", "by": str(index)}
            weights = {name: value.float() for name, value in held.items()}
            save_file(weights, place / str(index) / "model.safetensors", metadata=metadata)
        paths = {f"e{i}": str(place / str(i)) for i in range(1, experts + 1)}
        request = {"base": str(place / "0"), "experts": paths, "method": "average"}
        profile = cProfile.Profile()
        with profile:
            recipe = check_recipe(request)
            with open_inputs(recipe) as inputs:
                make_plan(recipe, inputs)
        return pstats.Stats(profile).total_calls  # pyright: ignore[reportAttributeAccessIssue]

    calls(10, 2, True)  # what is imported and compiled once
    few, tensors, experts = calls(300, 4, True), calls(600, 4, True), calls(300, 8, True)
    others = calls(300, 4, False)
    assert tensors < 2.1 * few and experts < 2.1 * few
    assert few < 100 * 300 * 4 and others < 150 * 300 * 4


@pytest.mark.parametrize(
    ("path", "shown"),
    [("/home/me/a", "a"), ("~/a/b/", "b"), ("models/a", "models/a"), ("..\\x", "x"), ("/", "/")],
)
def test_published_paths_are_not_private(path: str, shown: str) -> None:
    assert public_path(path) == shown
