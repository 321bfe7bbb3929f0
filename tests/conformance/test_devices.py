"""Every method on matrices computes where they lie: no tensor of the CPU gets among them.

Element-wise methods are carried out on the CPU, whatever the device.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eutectic.linalg.lowrank import LowRankStack
from helpers.pretended_device import DEVICE, pretended

from .cases import METHODS, Case, make_case, relative_error


def there(case: Case) -> Case:
    statistics, factors = case.statistics, case.factors
    if factors is not None:
        factors = LowRankStack(
            *(tuple(f.to(DEVICE) for f in side) for side in (factors.left, factors.right))
        )
    return replace(
        case,
        deltas=case.deltas.to(DEVICE),
        base=None if case.base is None else case.base.to(DEVICE),
        factors=factors,
        statistics=None if statistics is None else tuple(s.to(str(DEVICE)) for s in statistics),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not m.elementwise])
def test_the_result_lies_where_the_deltas_do(name, dtype):
    case = make_case(name, (24, 20), dtype=dtype, experts=3)
    expected = case.merged()
    with pretended():
        merged = there(case).merged()
        assert merged.device == DEVICE
        found = merged.cpu()
    assert relative_error(found, expected) < (1e-4 if dtype == torch.float32 else 1e-9)
