"""Which tokens count: masks of batches for collecting, masks of arguments for routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eutectic.errors import RequestError, StatisticsError
from eutectic.models.batches import Layout, decoder_mask, layout, predicting_positions
from eutectic.models.sites import Role, Site
from eutectic.routed.forward_masks import open_frame

IDS = torch.tensor([[5, 6, 7], [8, 9, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
LABELS = torch.tensor([[4, 3, -100, -100], [2, 1, 1, -100]])


def _site(role: Role = "text") -> Site:
    module = nn.Linear(2, 2)
    return Site("x.weight", "x", module, "linear", role, (2, 2), module.weight)


def _counted(found: Layout, role: Role, *shape: int) -> Tensor | None:
    tokens = found.tokens(_site(role), torch.zeros(*shape))
    assert tokens is not None
    assert tokens.arrange(torch.zeros(*shape)).shape[0] == found.samples
    return tokens.mask


@pytest.mark.parametrize("shape", [(2, 3, 2), (6, 2), (3, 2, 2)])
def test_activations_meet_their_mask_in_any_order(shape: tuple[int, ...]) -> None:
    found = layout({"input_ids": IDS, "attention_mask": MASK}, paired=False)
    mask = _counted(found, "text", *shape)
    assert mask is not None and torch.equal(mask, MASK.bool())


def test_without_a_mask_every_token_counts() -> None:
    mask = _counted(layout({"input_ids": IDS}, paired=False), "text", 2, 3, 2)
    assert mask is not None and bool(mask.all())


def test_rows_that_fit_nothing_are_refused_counted_or_skipped() -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK}
    with pytest.raises(StatisticsError, match="fit no mask"):
        layout(batch, paired=False).tokens(_site(), torch.zeros(5, 2))
    assert layout(batch, False, unmatched="skip").tokens(_site(), torch.zeros(5, 2)) is None
    every = layout(batch, False, unmatched="all").tokens(_site(), torch.zeros(5, 2))
    assert every is not None and every.mask is None and not every.pooled
    with pytest.raises(RequestError, match="attention mask must be"):
        layout({"input_ids": IDS, "attention_mask": MASK[:1]}, paired=False)


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ({"labels": LABELS}, LABELS != -100),
        ({"labels": LABELS, "decoder_attention_mask": torch.ones(2, 4)}, torch.ones(2, 4).bool()),
    ],
)
def test_collecting_and_routing_agree_on_the_decoder(given: dict[str, Any], counts: Tensor) -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK, **given}
    names = ("input_ids", "attention_mask", "decoder_input_ids", "labels")
    frame = open_frame(batch, names, None, True)
    found = layout(batch, paired=True)
    assert frame.mask is not None and found.second is not None
    assert torch.equal(frame.mask, counts) and torch.equal(found.second, counts)
    assert frame.cross_mask is not None and found.first is not None
    assert torch.equal(frame.cross_mask, found.first)


def test_labels_that_are_no_tokens_say_nothing_of_positions() -> None:
    assert predicting_positions(torch.tensor([0, 1])) is None
    assert predicting_positions(torch.rand(2, 3)) is None
    assert predicting_positions(None) is None
    ids = torch.tensor([[1, 2]])
    assert torch.equal(decoder_mask({"decoder_input_ids": ids}), torch.ones(1, 2).bool())
