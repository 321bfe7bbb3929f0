"""The isotropic and singular-vector methods give the authors' own numbers.

Inputs and outputs of the official code are stored in official.safetensors (see README.md there).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from eutectic.methods import merge_matrices

CASES = ("16x24x3", "24x16x2", "36x36x4")


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    return load_file(Path(__file__).with_name("official.safetensors"))


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("support", ["numerical", "full"])
@pytest.mark.parametrize(
    ("method", "parameters", "stored"),
    [
        ("iso_c", {}, "iso_c"),
        ("iso_cts", {"common_fraction": 0.5}, "iso_cts@0.5"),
        ("iso_cts", {"common_fraction": 0.8}, "iso_cts@0.8"),
        ("tsv_m", {}, "tsv_m"),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_official_numbers(official, case, method, parameters, stored, support, precision):
    if method != "tsv_m":
        parameters = {**parameters, "support": support}
    ours = merge_matrices(method, official[f"{case}/deltas"], precision=precision, **parameters)
    theirs = official[f"{case}/{stored}"]
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5
