"""Factors between layers (ESM): a fused matrix gives what its parts give when stored apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import eutectic
from eutectic.errors import NumericalError
from eutectic.planning import values
from eutectic.types import LayerStatistics

PARTS = "qkv"
RISE = torch.tensor([1.0, 3.0, 9.0]).repeat_interleave(8)[:, None]  # q, k and v grow differently


def apart(fused: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("qkv", part): w[8 * i : 8 * i + 8]
        for name, w in fused.items()
        for i, part in enumerate(PARTS)
    }


@pytest.mark.parametrize("preset", ["vit", "roberta"])
@pytest.mark.parametrize("chunk", [1 << 17, 37])
def test_fused_and_separate_matrices_are_scaled_alike(
    preset: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "CHUNK", chunk)
    g = torch.Generator().manual_seed(1)
    names = [f"h.{i}.qkv.weight" for i in range(3)]
    base = {name: torch.randn(24, 8, generator=g) for name in names}
    experts = {
        e: {n: w + 0.1 * RISE**i * torch.randn(24, 8, generator=g)
            for i, (n, w) in enumerate(base.items())}
        for e in "ab"
    }  # fmt: skip

    def seen() -> LayerStatistics:
        x = torch.randn(50, 8, generator=g, dtype=torch.float64)
        return LayerStatistics(gram=x.T @ x, count=50)

    statistics = {e: {name: seen() for name in names} for e in "ab"}
    options = {"method": "esm", "preset": preset, "scale": 1.0}
    fused = eutectic.merge_state_dicts(
        base, experts, statistics=statistics, tensors=[{"match": "*qkv*", "split": 3}], **options
    )
    separate = eutectic.merge_state_dicts(
        apart(base),
        {e: apart(w) for e, w in experts.items()},
        statistics={
            e: {n.replace("qkv", p): s for n, s in own.items() for p in PARTS}
            for e, own in statistics.items()
        },
        **options,
    )
    for name, w in apart(fused).items():
        torch.testing.assert_close(w, separate[name], rtol=1e-6, atol=1e-6)


def test_an_indefinite_gram_names_the_part_it_belongs_to() -> None:
    base = {"qkv.weight": torch.zeros(24, 4)}
    experts = {e: {"qkv.weight": torch.full((24, 4), v)} for e, v in (("a", 1.0), ("b", 2.0))}
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0]))
    statistics = {e: {"qkv.weight": LayerStatistics(gram=gram, count=4)} for e in experts}
    rules = [{"match": "*qkv*", "split": 3}]
    with pytest.raises(NumericalError, match=r"^qkv\.weight\[0\]: .*not positive semidefinite"):
        eutectic.merge_state_dicts(
            base, experts, method="regmean", statistics=statistics, tensors=rules, threads=1
        )
