"""One list of a model's linear maps, for collecting and for routing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eutectic.models.sites import find_sites, routable_sites


class _OwnForward(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class _OwnAttention(nn.MultiheadAttention):
    def forward(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
        return super().forward(*args, **kwargs)  # type: ignore[arg-type]


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.MultiheadAttention(4, 2)
        self.separate = nn.MultiheadAttention(4, 2, kdim=6, vdim=6)
        self.foreign = _OwnAttention(4, 2)
        self.plain = nn.Linear(4, 3)
        self.tied = nn.Linear(4, 3)
        self.tied.weight = self.plain.weight
        self.special = _OwnForward(4, 4)
        self.table = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(2, 3, 2)


def test_what_is_observed_and_what_is_said_of_the_rest() -> None:
    sites = find_sites(_Model())
    assert [s.name for s in sites.found] == [
        "packed.in_proj_weight",
        *(f"packed.in_proj_weight[{part}]" for part in "qkv"),
        "packed.out_proj.weight",
        *(f"separate.{part}_proj_weight" for part in "qkv"),
        "separate.out_proj.weight",
        "plain.weight",
        "special.weight",
    ]
    assert sites.aliases == {"tied.weight": "plain.weight"}
    assert sites.skipped.keys() == {"foreign.in_proj_weight", "foreign.out_proj.weight"}
    shapes = {s.name: s.shape for s in sites.found}
    assert shapes["packed.in_proj_weight"] == (12, 4)
    assert shapes["separate.k_proj_weight"] == (4, 6)


def test_what_can_be_routed_is_a_part_of_it() -> None:
    assert {s.name: s.kind for s in routable_sites(_Model())} == {
        "packed.in_proj_weight": "in_projection",
        "packed.out_proj.weight": "out_projection",
        "plain.weight": "linear",
        "tied.weight": "linear",
    }


def test_convolutions_are_observed_on_request() -> None:
    (conv,) = (s for s in find_sites(_Model(), convolutions=True).found if s.name == "conv.weight")
    assert conv.shape == (3, 8)
    assert "conv.weight" not in {s.name for s in routable_sites(_Model())}


@pytest.mark.parametrize(("pattern", "count"), [("plain.*", 1), ("packed.*", 5), ("none", 0)])
def test_globs_choose(pattern: str, count: int) -> None:
    assert len(find_sites(_Model(), [pattern]).found) == count


def test_names_are_those_of_the_checkpoint_and_matrices_are_out_by_in() -> None:
    hf = pytest.importorskip("transformers")
    config = hf.GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    (first,) = (s for s in routable_sites(hf.GPT2Model(config)) if s.path == "h.0.mlp.c_fc")
    assert first.kind == "conv1d"
    assert first.shape == (16, 4) == first.matrix(first.weight).shape
