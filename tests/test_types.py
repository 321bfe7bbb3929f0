"""The records that rooms share: statistics in memory have the surface of a statistics file."""

from __future__ import annotations

import torch
from torch import nn

import eutectic
from eutectic.types import LayerStatistics, Statistics, as_statistics

ENTRY = LayerStatistics(gram_factor=torch.ones(2, 5), count=3)


def test_a_mapping_is_wrapped() -> None:
    statistics = as_statistics({"w": ENTRY})
    assert isinstance(statistics, Statistics)
    assert list(statistics) == ["w"] and "w" in statistics and "v" not in statistics
    assert statistics.has("w", "gram") and not statistics.has("w", "fisher_diagonal")
    assert not statistics.has("v", "gram")
    assert statistics.read("w", ["fisher_diagonal"]) is ENTRY
    assert statistics.read_bytes("w", ["gram"]) == 0
    assert (statistics.fingerprint, dict(statistics.samples), dict(statistics.provenance)) == (
        None,
        {},
        {},
    )


def test_what_collect_returns_is_taken_as_it_is() -> None:
    collected = eutectic.collect(nn.Sequential(nn.Linear(3, 2)), [torch.ones(4, 3)])
    assert isinstance(collected, Statistics) and as_statistics(collected) is collected
    assert collected.has("0.weight", "gram") and collected.fingerprint
    assert collected.read("0.weight", only=()).gram is None
