"""RegMean and MaTS give the numbers of the authors' own code.

Inputs and outputs of the official code are stored in official.safetensors (see README.md there).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from eutectic.methods import merge_matrices
from eutectic.types import LayerStatistics

CASES = ("16x24x3", "24x16x2", "36x36x4")
TOKENS = 256


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    return load_file(Path(__file__).with_name("official.safetensors"))


def collected(official: dict[str, Tensor], case: str) -> list[LayerStatistics]:
    grams, outputs = official[f"{case}/A"], official[f"{case}/G"]
    return [
        LayerStatistics(gram=a * TOKENS, output_gradient_gram=h * TOKENS, count=TOKENS)
        for a, h in zip(grams, outputs, strict=True)
    ]


def distance(official: dict[str, Tensor], case: str, delta: Tensor, stored: str) -> float:
    theirs = official[f"{case}/{stored}"]
    return float((official[f"{case}/base"] + delta - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("space", ["delta", "weight"])
@pytest.mark.parametrize("steps", [3, 10])
@pytest.mark.parametrize(("operator", "key"), [("gram", "fwd"), ("kfac", "kfac")])
@pytest.mark.parametrize("case", CASES)
def test_iterates_of_the_official_code(official, case, operator, key, steps, space):
    delta = merge_matrices(
        "mats",
        official[f"{case}/deltas"],
        base=official[f"{case}/base"],
        statistics=collected(official, case),
        operator=operator,
        init="task_arithmetic",
        init_scale=0.3,
        iterations=steps,
        preconditioner="none",
        tolerance=1e-5,
        space=space,
    )
    assert distance(official, case, delta, f"mats_{key}_it{steps}") < 1e-5


@pytest.mark.parametrize("preconditioner", ["none", "jacobi", "kronecker"])
@pytest.mark.parametrize(("operator", "key"), [("gram", "fwd"), ("kfac", "kfac")])
@pytest.mark.parametrize("case", CASES)
def test_convergence_to_the_exact_solution(official, case, operator, key, preconditioner):
    merged = merge_matrices(
        "mats",
        official[f"{case}/deltas"],
        statistics=collected(official, case),
        operator=operator,
        iterations=2000,
        tolerance=1e-7,
        preconditioner=preconditioner,
        damping=0.0,  # as published
        full_output=True,
    )
    assert merged.record["status"] == "converged"
    assert distance(official, case, merged.delta, f"mats_{key}_exact") < 1e-5


@pytest.mark.parametrize("space", ["delta", "weight"])
@pytest.mark.parametrize("case", CASES)
def test_closed_forms(official, case, space):
    inputs = {
        "deltas": official[f"{case}/deltas"],
        "base": official[f"{case}/base"],
        "statistics": collected(official, case),
        "space": space,
    }
    regmean = merge_matrices("regmean", off_diagonal=0.9, **inputs)
    assert distance(official, case, regmean, "regmean_0.9") < 1e-6
    direct = merge_matrices("mats", operator="gram", solver="direct", **inputs)
    assert distance(official, case, direct, "mats_fwd_exact") < 1e-5
