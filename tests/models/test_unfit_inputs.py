"""Errors of a model in words, where its sizes explain them, and as they are where not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from eutectic.errors import RequestError
from eutectic.models.unfit_inputs import unfit_in_words


def test_memory_that_is_full_is_not_blamed_on_the_length() -> None:
    """A model of rotary positions takes more tokens than its configuration says."""
    model: Any = nn.Linear(1, 1)
    model.config = SimpleNamespace(max_position_embeddings=4, model_type="llama")
    batch = {"input_ids": torch.ones(1, 5).long()}
    told = pytest.raises(RequestError, match="5 tokens, and the model has 4 positions")
    with told, unfit_in_words(model, batch):
        raise RuntimeError("sizes differ")
    with pytest.raises(torch.OutOfMemoryError), unfit_in_words(model, batch):
        raise torch.OutOfMemoryError("full")
