"""Rows of a fused matrix, of output gradients that are kept in few rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from eutectic.execution.matrix_merging import part_statistics
from eutectic.types import LayerStatistics


def test_a_part_has_its_own_output_gradients() -> None:
    factor, rest = torch.randn(4, 30), torch.rand(30)
    entry = LayerStatistics(output_gradient_factor=factor, output_gradient_diagonal=rest)
    planned: Any = SimpleNamespace(shape=(30, 8), name="layers.0.up.weight")
    inputs: Any = None  # nothing more is read of one that is not packed
    rows = slice(10, 20)
    (part, none) = part_statistics(planned, inputs, (entry, None), rows) or (None, None)
    assert part is not None and none is None
    whole = entry.dense("output_gradient_gram")
    assert whole is not None
    torch.testing.assert_close(part.dense("output_gradient_gram"), whole[rows, rows])
