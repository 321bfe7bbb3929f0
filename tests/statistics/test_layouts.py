"""Whose axis is whose: image towers with the sequence first, and encoders without a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import eutectic
from eutectic.errors import StatisticsError
from eutectic.statistics import add_statistics
from helpers.configs import tiny_model


class Tower(nn.Module):
    """An OpenCLIP-style tower: `[samples, tokens, features]` is turned round on the way in."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.fc(x).transpose(0, 1)


def test_an_image_tower_with_the_sequence_first_is_pooled_per_sample() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"visual": Tower()})
    model.forward = lambda image: model["visual"](image)  # type: ignore[method-assign]
    images = torch.randn(6, 5, 8)
    found = eutectic.collect(model, [{"image": images}])
    plain = eutectic.collect(model["visual"], [images])
    for name in ("attn.in_proj_weight", "fc.weight"):
        ours, theirs = found[f"visual.{name}"], plain[name]
        assert (ours.count, ours.sample_count) == (30, 6)
        assert ours.pooled_gram is not None and theirs.pooled_gram is not None
        torch.testing.assert_close(ours.pooled_gram, theirs.pooled_gram)
    wanted = images.mean(1).sum(0)
    pooled = found["visual.attn.in_proj_weight"].pooled_sum
    assert pooled is not None
    torch.testing.assert_close(pooled, wanted, rtol=1e-5, atol=1e-5)


def test_an_encoder_without_a_mask_does_not_take_the_decoders() -> None:
    torch.manual_seed(0)
    model = tiny_model("WhisperForConditionalGeneration").eval()
    labels = torch.randint(3, 39, (4, 10))  # as long as the encoder's output
    for row, length in enumerate((10, 4, 6, 1)):
        labels[row, length:] = -100
    found = eutectic.collect(model, [{"input_features": torch.randn(4, 8, 20), "labels": labels}])
    counts = {name: found[name].count for name in found}
    for part in ("encoder.layers.0.fc1", "decoder.layers.0.encoder_attn.k_proj"):
        assert counts[f"model.{part}.weight"] == 40, part
    assert counts["model.decoder.layers.0.fc1.weight"] == 21


def test_statistics_under_different_token_masks_cannot_be_added() -> None:
    def every_token(batch: Tensor) -> Tensor:
        return torch.ones(batch.shape[:2])

    def first_token(batch: Tensor) -> Tensor:
        return (torch.arange(batch.shape[1]) == 0).expand(batch.shape[:2])

    model = nn.Linear(3, 3)
    files = [
        eutectic.collect(model, [torch.randn(2, 4, 3)], token_mask=mask)
        for mask in (every_token, first_token)
    ]
    with pytest.raises(StatisticsError, match=r"token_mask: .*every_token.* and .*first_token"):
        add_statistics(files)
