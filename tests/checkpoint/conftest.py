from __future__ import annotations

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """One tensor of every kind: all float types, integers, booleans, 0-dim, empty."""
    g = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(5, 7, generator=g),
        "layer.half": torch.randn(3, 4, generator=g).half(),
        "layer.bf16": torch.randn(9, generator=g).bfloat16(),
        "layer.double": torch.randn(2, 3, generator=g).double(),
        "ids": torch.arange(6).view(2, 3),
        "small": torch.tensor([-3, 4], dtype=torch.int8),
        "bytes": torch.tensor([0, 255, 7], dtype=torch.uint8),
        "mask": torch.tensor([[True, False, True]]),
        "count": torch.tensor(41),
        "scale": torch.tensor(0.5),
        "empty": torch.zeros(0, 4),
        "eighth": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
    }
