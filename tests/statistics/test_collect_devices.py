"""Collections on a device without float64, as Apple's GPUs are: passes there, sums on the CPU.

The device is pretended (`helpers/pretended_device.py`), and refuses what a real one refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_models
import torch
from torch import nn

from eutectic.cluster import devices
from eutectic.errors import ResumeError
from eutectic.statistics import StatisticsFile, collect
from eutectic.statistics.recorder import PassSums
from helpers.folders import digests
from helpers.pretended_device import DEVICE, pretended

SUMS = ("gram", "input_sum", "pooled_gram", "pooled_sum")
OF_GRADIENTS = ("output_gradient_gram", "fisher_diagonal", "block_fisher")


@contextmanager
def apples() -> Iterator[None]:
    """Let the pretended device have no float64, and the library know it."""
    without = mock.patch.object(devices, "WITHOUT_FLOAT64", frozenset({DEVICE.type}))
    with pretended(float64=False), without:
        yield


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, generator=generator) for _ in range(6)]


def texts() -> list[dict[str, torch.Tensor]]:
    """Return a padded batch, and one without padding or mask."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 30, (2, 3, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]])
    labels = torch.tensor([0, 1, 2])
    padded = {"input_ids": tokens[0], "attention_mask": mask, "labels": labels}
    return [padded, {"input_ids": tokens[1], "labels": labels}]


@pytest.mark.parametrize(
    ("make", "data", "asked"),
    [
        (plain, rows, {}),
        (plain, rows, {"rank": 2}),
        (tiny_models.gpt2, lambda: [{"input_ids": b["input_ids"]} for b in texts()], {}),
        (tiny_models.bert, texts, {"output_gradients": True, "labels": "sample"}),
        (plain, rows, {"fisher": True, "block_fisher": True, "labels": "sample"}),
        (plain, rows, {"output_gradients": True, "labels": "sample", "objective": "multi-label"}),
    ],
    ids=["rows", "rank", "tokens", "gradients", "fisher", "labels of numbers"],
)
def test_sums_are_those_of_the_cpu(
    make: Callable[[], nn.Module], data: Callable[[], list[Any]], asked: dict[str, Any]
) -> None:
    asked = {**asked, "dtype": torch.float64}
    alone, model = collect(make(), data(), **asked), make()
    with apples():
        found = collect(model.to(DEVICE), data(), **asked)
    assert list(found) == list(alone)
    for name, own in alone.items():
        for kind in (*SUMS, *OF_GRADIENTS):
            one, other = getattr(found[name], kind), getattr(own, kind)
            assert (one is None) == (other is None)
            if one is not None:
                assert one.device.type == "cpu" and one.dtype == torch.float64
                tiny_models.assert_near(one, other)


def test_every_sum_is_kept_in_float64_on_the_cpu() -> None:
    kept: list[PassSums] = []
    tensors = PassSums.tensors

    def noting(sums: PassSums, *given: Any) -> Any:
        kept.append(sums)
        return tensors(sums, *given)

    model, many = plain(), [row.repeat(25, 1) for row in rows()]  # beyond a block
    with apples(), mock.patch.object(PassSums, "tensors", noting):
        collect(model.to(DEVICE), many)
    state = kept[0].state()
    assert {t.device.type for t in state.values()} == {"cpu"}
    matrices = [t for n, t in state.items() if n.endswith(("/matrix", "_sum"))]
    assert len(matrices) == 8 and {t.dtype for t in matrices} == {torch.float64}


def interrupted(model: nn.Module, output: Path) -> None:
    def interrupt(done: int, _: object) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, rows(), output, progress=interrupt, snapshot_seconds=0.0)


def test_a_killed_collection_goes_on_where_it_was_begun(tmp_path: Path) -> None:
    there, again, here = plain(), plain(), plain()
    with apples():
        collect(there.to(DEVICE), rows(), tmp_path / "undisturbed")
        interrupted(there, tmp_path / "begun there")
        assert (tmp_path / "begun there.partial" / "snapshot.safetensors").exists()
        collect(again.to(DEVICE), rows(), tmp_path / "begun there")
    files = digests(tmp_path)
    assert files["begun there"] == files["undisturbed"]

    interrupted(here, tmp_path / "begun here")
    words = f"begun on the CPU, and this one runs on {DEVICE}.*\n.*--device it was begun on"
    with apples(), pytest.raises(ResumeError, match=words):
        collect(there, rows(), tmp_path / "begun here")
    with apples():
        interrupted(there, tmp_path / "other")
    with pytest.raises(ResumeError, match=f"begun on '{DEVICE}', and this one runs on the CPU"):
        collect(here, rows(), tmp_path / "other")
    found: StatisticsFile = collect(here, rows(), tmp_path / "begun here")
    assert found["0.weight"].count == 24
