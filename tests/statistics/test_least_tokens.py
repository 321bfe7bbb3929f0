"""Sums over few tokens: refused where that is asked for, and what they would tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eutectic.errors import RequestError
from eutectic.statistics import add_statistics, collect


class Net(nn.Module):
    """A layer that sees tokens, and one that sees one row per example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.pooler = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooler(self.layer(x).mean(1))


def data(examples: int, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return list(torch.randn(examples, 5, 6).split(4))


def test_sums_over_fewer_tokens_are_not_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, output = Net(), tmp_path / "a.stats"
    with pytest.raises(RequestError) as refused:
        collect(model, data(10), output, min_tokens=40)
    # 10 examples give the pooler 10 rows, and the layer 50.
    assert "'pooler.weight': 10, in 10 examples" in str(refused.value)
    assert "layer.weight" not in str(refused.value) and "about 40 examples" in str(refused.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RequestError, match=r"fewer than 51 tokens.*'layer.weight': 50"):
        collect(model, data(10), output, min_tokens=51, layers=["layer.*"])
    with pytest.raises(RequestError, match="min_tokens must be at least 1"):
        collect(model, data(10), output, min_tokens=0)
    enough = collect(model, data(10), output, min_tokens=10)
    plain = collect(model, data(10), tmp_path / "plain.stats")
    assert enough.path is not None and plain.path is not None
    assert enough.path.read_bytes() == plain.path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.stats", "plain.stats"]


def test_of_added_files_the_whole_counts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    parts = [collect(model, data(10, seed)) for seed in (1, 2)]
    with pytest.raises(RequestError, match="fewer than 21 tokens"):
        add_statistics(parts, tmp_path / "sum", min_tokens=21)
    assert not list(tmp_path.iterdir())
    assert add_statistics(parts, tmp_path / "sum", min_tokens=20)["pooler.weight"].count == 20


def test_squared_gradients_count_examples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3))
    batches = [(torch.randn(4, 6),), (torch.randn(4, 6),)]

    def likelihood(outputs: Tensor, _: object) -> Tensor:
        return outputs.log_softmax(-1)[:, 0]

    with pytest.raises(RequestError, match="0.weight, 1.bias, .* 8, in 8 examples"):
        collect(model, batches, fisher=True, objective=likelihood, min_tokens=9)


@pytest.mark.parametrize("tokens", [3, 12, 60, 400])
def test_what_a_gram_rules_out(tokens: int) -> None:
    """Of known vectors, a Gram of few rules out all others, and one of many rules out none."""
    torch.manual_seed(0)
    vocabulary, width = torch.randn(500, 20, dtype=torch.float64), 20
    chosen = torch.randperm(500)[:tokens]
    layer = nn.Linear(width, 1, bias=False).double()
    gram = collect(layer, [vocabulary[chosen]], dtype=torch.float64)["weight"].dense_gram()
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-9 * values[-1]
    inside = vocabulary @ vectors[:, kept]
    outside = vocabulary.square().sum(1) - inside.square().sum(1)
    leverage = inside.square() @ values[kept].reciprocal()
    possible = set(((outside < 1e-6) & (leverage < 1 + 1e-6)).nonzero().flatten().tolist())
    assert possible >= set(chosen.tolist())
    if tokens < width:
        assert len(possible) == tokens
    elif tokens >= 10 * width:
        assert len(possible) == 500
