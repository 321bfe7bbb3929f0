"""ESM and the experts of ESM++ against the numbers of the authors' code."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eutectic.linalg.essential import essential_subspace
from eutectic.methods import merge_matrices
from eutectic.types import LayerStatistics

GOLDEN = load_file(Path(__file__).parent / "official.safetensors")
SHAPES = sorted({key.split("/")[0] for key in GOLDEN if key.endswith("/esm_vit")})
TOKENS = 256


def statistics(shape: str, form: str) -> list[LayerStatistics]:
    if form == "factor":
        return [LayerStatistics(gram_factor=X, count=TOKENS) for X in GOLDEN[f"{shape}/X"]]
    return [LayerStatistics(gram=A * TOKENS, count=TOKENS) for A in GOLDEN[f"{shape}/A"]]


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def test_the_file_holds_square_tall_and_wide_matrices():
    assert len(SHAPES) == 3


@pytest.mark.parametrize("form", ["gram", "factor"])
@pytest.mark.parametrize("preset", ["vit", "roberta"])
@pytest.mark.parametrize("shape", SHAPES)
def test_esm_gives_the_official_numbers(shape: str, preset: str, form: str):
    deltas = GOLDEN[f"{shape}/deltas"]
    merged = merge_matrices("esm", deltas, statistics=statistics(shape, form), preset=preset)
    assert relative_error(merged, GOLDEN[f"{shape}/esm_{preset}"]) < 1e-5


@pytest.mark.parametrize("form", ["gram", "factor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rank_4_experts_are_the_official_ones(shape: str, form: str):
    for t, delta in enumerate(GOLDEN[f"{shape}/deltas"]):
        up = essential_subspace(delta, statistics(shape, form)[t], 4).directions
        expert = up @ (up.T @ delta.double())
        assert relative_error(expert, GOLDEN[f"{shape}/esmpp_r4_t{t}"]) < 1e-4
