"""Grams of grouped convolutions: one for each group, of the patches that its kernels see."""

from pathlib import Path

import pytest
import torch
from torch import nn

from eutectic.statistics import add_statistics, collect, load_statistics
from eutectic.statistics.group_gram import GroupedGramSum


def patches(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Return what each group's kernels see, `[n, groups, in·k·k]`, cut out one by one."""
    x = nn.functional.pad(x, (conv.padding[0],) * 4).double()
    (k, _), (step, _) = conv.kernel_size, conv.stride
    inner = conv.in_channels // conv.groups
    rows = []
    for image in x:
        for i in range(0, image.shape[1] - k + 1, step):
            for j in range(0, image.shape[2] - k + 1, step):
                whole = image[:, i : i + k, j : j + k]
                rows.append(torch.stack([g.flatten() for g in whole.split(inner)]))
    return torch.stack(rows)


@pytest.mark.parametrize("groups", [2, 6])
def test_each_group_has_its_gram(groups: int, tmp_path: Path) -> None:
    conv = nn.Conv2d(6, 12, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(4, 6, 7, 7)
    file = tmp_path / "s.safetensors"
    collect(nn.Sequential(conv), [x[:1], x[1:]], file, convolutions=True)
    layer = load_statistics(file)["0.weight"]
    rows = patches(conv, x)
    expected = torch.einsum("ngi,ngj->gij", rows, rows)
    torch.testing.assert_close(layer.gram.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        layer.input_sum.double(), rows.sum(0).flatten(), rtol=1e-5, atol=1e-4
    )
    assert (layer.count, layer.sample_count) == (len(rows), 4)
    # They are what the layer multiplies: outputs follow from them group by group.
    kernels = conv.weight.double().reshape(groups, -1, rows.shape[2])
    squares = torch.einsum("goi,gij,goj->go", kernels, expected, kernels).flatten()
    bare = nn.functional.conv2d(x.double(), conv.weight.double(), None, 2, 1, 1, groups)
    torch.testing.assert_close(squares, bare.square().sum((0, 2, 3)), rtol=1e-9, atol=1e-9)


def test_sums_of_groups_add_up_and_go_on(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Conv1d(4, 4, 1))
    x = torch.randn(6, 4, 8)
    whole = collect(model, [x], convolutions=True, rank=1)
    parts = [collect(model, [p], convolutions=True, rank=1) for p in (x[:2], x[2:])]
    added = add_statistics(parts)["0.weight"]
    torch.testing.assert_close(added.gram, whole["0.weight"].gram)
    assert added.gram.shape == (4, 3, 3)  # whole whatever the rank
    rows = torch.randn(700, 6)
    one, first, second = (GroupedGramSum(2, 3) for _ in range(3))
    one.add(rows)
    first.add(rows[:10])
    second.load(first.state())
    second.join(_sum_of(rows[10:]).state())
    assert second.count == one.count == 700
    torch.testing.assert_close(second.tensors()["gram"], one.tensors()["gram"])
    assert GroupedGramSum(2, 3).tensors() == {}


def _sum_of(rows: torch.Tensor) -> GroupedGramSum:
    found = GroupedGramSum(2, 3)
    found.add(rows)
    return found
