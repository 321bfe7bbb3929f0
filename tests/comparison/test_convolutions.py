"""A comparison whose recipe takes convolutions as matrices has methods on entries in it too."""

from pathlib import Path
from typing import Any

import torch

from eutectic.comparison.candidates import Way, candidates_of
from eutectic.comparison.merging import planned
from eutectic.execution.executors import limits_of
from eutectic.tuning.objectives import Opened
from helpers.folders import save


def test_methods_on_entries_merge_kernels_alike(tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"experts": {}, "convolutions": "matrix"}
    for name in ("base", "a", "b"):
        tensors = {"0.weight": torch.randn(4, 3, 2, 2), "0.bias": torch.randn(4)}
        folder = str(save(tmp_path / name, tensors))
        recipe |= {"base": folder} if name == "base" else {}
        recipe["experts"] |= {} if name == "base" else {name: folder}
    candidates = candidates_of(["ties", "iso_c", "ties+svc"], recipe, False)
    requests, left_out = planned(
        candidates, [Way("1", 1.0)], recipe, limits_of(), Opened(), stated=True
    )
    assert not left_out
    stated = [request.recipe.get("convolutions") for request in requests]
    assert stated == [None, "matrix", "matrix"]
