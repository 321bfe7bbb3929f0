"""Guards that state dicts in memory behave as files do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eutectic.checkpoint.expert_tensors import full_expert
from eutectic.checkpoint.reader import StateDictReader
from eutectic.checkpoint.writer import MemoryWriter
from eutectic.errors import CheckpointError

from .helpers import same_bytes


def test_reads_copies(tensors: dict[str, Tensor]) -> None:
    reader = StateDictReader(tensors)
    for name, value in tensors.items():
        assert same_bytes(reader.read(name), value)
        assert reader.entries[name].shape == tuple(value.shape)
        assert reader.entries[name].nbytes == value.numel() * value.element_size()
    reader.read("layer.weight").zero_()
    assert tensors["layer.weight"].abs().sum() > 0
    assert torch.equal(reader.read("ids", 2, 5), tensors["ids"].reshape(-1)[2:5])
    assert reader.identity() == []


def test_tied_and_strided_tensors() -> None:
    shared = torch.arange(6.0).view(2, 3)
    reader = StateDictReader({"a": shared, "b": shared, "t": shared.T})
    assert torch.equal(reader.read("a"), reader.read("b"))
    assert torch.equal(reader.read("t", 1, 4), shared.T.reshape(-1)[1:4])


def test_parameters_carry_no_gradient() -> None:
    layer = torch.nn.Linear(2, 2)
    reader = StateDictReader({"w": layer.weight})
    assert not reader.read("w").requires_grad


@pytest.mark.parametrize("value", [3, None, "x", [1.0], {"a": torch.ones(1)}])
def test_other_values_are_refused_by_name(value: Any) -> None:
    with pytest.raises(CheckpointError, match="expert 'x': 'b' is not a tensor"):
        StateDictReader({"a": torch.ones(1), "b": value}, "expert 'x'")


@pytest.mark.parametrize("value", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")])
def test_tensors_without_dense_data_are_refused(value: Tensor) -> None:
    with pytest.raises(CheckpointError, match="only dense"):
        StateDictReader({"b": value})


def test_empty_state_dict() -> None:
    with pytest.raises(CheckpointError, match="holds no tensors"):
        StateDictReader({})


def test_expert_in_memory() -> None:
    base = StateDictReader({"m.w": torch.ones(4), "m.b": torch.ones(2)})
    tuned = {"w": torch.full((4,), 3.0), "head": torch.ones(1)}
    expert = full_expert(StateDictReader(tuned), base.entries, "expert 'x'")
    delta = expert.delta("m.w", 1, 3, base=base.read("m.w", 1, 3), dtype=torch.float32)
    assert delta.tolist() == [2, 2]
    assert expert.missing == ("m.b",)
    assert list(expert.extra) == ["m.head"]
    assert tuned["w"].tolist() == [3, 3, 3, 3]


def test_writer_collects_tensors() -> None:
    writer = MemoryWriter([("a", torch.float32, (2, 3))])
    writer.write("a", 2, torch.ones(4))
    writer.write("a", 0, torch.zeros(2))
    assert writer.tensors["a"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert writer.read_back("a", 1, 3).tolist() == [0, 1]
