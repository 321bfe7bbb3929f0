"""TIES gives the authors' own numbers, once the entry that their code keeps too many is kept too.

The official code keeps the entries at or above the int((1 − density)·n)-th smallest magnitude,
which is one entry more than int(density·n).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from eutectic.methods import merge_matrices

OFFICIAL = load_file(Path(__file__).with_name("official.safetensors"))
FLAT = OFFICIAL["ties/flat"]
STORED = sorted(key for key in OFFICIAL if key.startswith("ties/") and key != "ties/flat")


def merge_keeping(count: int, aggregate: str) -> Tensor:
    density = (count + 0.5) / FLAT.shape[1]
    return merge_matrices("ties", FLAT, density=density, aggregate=aggregate)


def parts_of(key: str) -> tuple[str, int]:
    aggregate, _, percent = key.removeprefix("ties/").partition("_k")
    return aggregate, int(FLAT.shape[1] * int(percent) / 100)


def test_means_and_sums_are_stored():
    assert {parts_of(key)[0] for key in STORED} == {"mean", "sum"}


@pytest.mark.parametrize("key", STORED)
def test_official_numbers_with_the_extra_entry(key):
    aggregate, kept = parts_of(key)
    merged, official = merge_keeping(kept + 1, aggregate), OFFICIAL[key]
    assert torch.allclose(merged, official, rtol=1e-6, atol=0)


@pytest.mark.parametrize("key", STORED)
def test_without_the_extra_entry_few_numbers_differ(key):
    aggregate, kept = parts_of(key)
    merged, official = merge_keeping(kept, aggregate), OFFICIAL[key]
    differing = int((~torch.isclose(merged, official, rtol=1e-6, atol=0)).sum())
    assert 0 < differing <= 2 * len(FLAT)
