"""Which tokens routers see where an encoder feeds a decoder, and what towers tell each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eutectic.errors import RequestError
from eutectic.routed import build_routed, routing
from eutectic.routed.routed_modules import Experts
from eutectic.statistics import collect
from eutectic.types import LayerStatistics
from helpers.configs import tiny_model

from .world import EXPERTS, Batch, World, output, t5, texts, world

TARGET = 52  # seed of the decoder's texts


def bart() -> World:
    return world(lambda: tiny_model("BartModel"), texts)


@cache
def built(kind: str, router: str = "discriminant", accumulate: bool = False) -> nn.Module:
    made = {"t5": t5, "bart": bart}[kind]()
    return build_routed(
        made.merged,
        made.state_dicts(),
        made.statistics(),
        rank=4,
        router=router,  # type: ignore[arg-type]
        accumulate=accumulate,
        layers=["*"],
    )


@contextmanager
def pooled(routed: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect what every router is given, layer by layer; experts stay off."""
    seen: dict[str, Tensor] = {}

    def watch(name: str):
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            seen[name] = torch.cat([seen[name], args[0]]) if name in seen else args[0]

        return hook

    layers = [m for m in routed.modules() if isinstance(m, Experts)]
    handles = [m.router.register_forward_pre_hook(watch(m.name)) for m in layers]
    try:
        with routing(routed, mode="base", record=True):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def in_turns(parts: list[Batch]) -> Batch:
    return {k: torch.stack([p[k] for p in parts], 1).flatten(0, 1) for k in parts[0]}


def pair(form: str, source: int, target: int) -> Batch:
    """Return 12 samples; `form` says what the batch tells about the decoder's tokens."""
    first = in_turns([texts(t, 4, 2, source) for t in range(3)])
    # One sample further, so that no row has as much padding in the target as in the source.
    own_rows = [texts(t, 5, TARGET, target) for t in range(3)]
    second = in_turns([{k: v[1:] for k, v in rows.items()} for rows in own_rows])
    if form == "mask":
        own = {
            "decoder_input_ids": second["input_ids"],
            "decoder_attention_mask": second["attention_mask"],
        }
    elif form == "labels":
        own = {"labels": second["input_ids"].masked_fill(second["attention_mask"] == 0, -100)}
    elif form == "unmasked":
        own = {"decoder_input_ids": second["input_ids"]}
    else:
        own = {}
    return {**first, **own}


def alone(batch: Batch) -> Iterator[Batch]:
    """Split a batch into samples without what their masks and labels leave out."""
    for n in range(len(batch["input_ids"])):
        sample = {k: v[n : n + 1] for k, v in batch.items()}
        keep = sample["attention_mask"][0].bool()
        for key in ("input_ids", "attention_mask"):
            sample[key] = sample[key][:, keep]
        if "labels" in sample:
            sample["labels"] = sample["labels"][:, sample["labels"][0] != -100]
        if "decoder_attention_mask" in sample:
            keep = sample["decoder_attention_mask"][0].bool()
            for key in ("decoder_input_ids", "decoder_attention_mask"):
                sample[key] = sample[key][:, keep]
        yield sample


@pytest.mark.parametrize(
    ("kind", "reads"),
    [
        ("t5", ("EncDecAttention.k", "EncDecAttention.v")),
        ("bart", ("encoder_attn.k_proj", "encoder_attn.v_proj")),
    ],
)
def test_keys_and_values_of_cross_attention_read_the_encoder(kind: str, reads: tuple[str, ...]):
    layers = [m for m in built(kind).modules() if isinstance(m, Experts)]
    crossed = {m.name for m in layers if m.crossed}
    assert crossed == {
        m.name for m in layers if m.name.endswith(tuple(f"{r}.weight" for r in reads))
    }
    assert len(crossed) == {"t5": 4, "bart": 2}[kind]


@pytest.mark.parametrize("router", ["discriminant", "prototype"])
@pytest.mark.parametrize(
    ("kind", "form", "target"),
    [
        ("t5", "mask", 6),
        ("t5", "mask", 9),
        ("t5", "labels", 6),
        ("t5", "labels", 9),
        ("t5", "unmasked", 9),
        ("bart", "mask", 9),
        ("bart", "unmasked", 9),
        ("bart", "shifted", 9),
    ],
)
def test_padding_is_no_part_of_what_routers_see(kind: str, form: str, target: int, router: str):
    routed = built(kind, router)
    batch = pair(form, 9, target)
    with pooled(routed) as together:
        output(routed, batch)
    with pooled(routed) as apart:
        for sample in alone(batch):
            output(routed, sample)
    assert together.keys() == apart.keys()
    assert any("decoder" in name for name in together)
    for name in together:
        torch.testing.assert_close(together[name], apart[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("router", ["discriminant", "prototype"])
def test_what_stands_in_either_padding_changes_nothing(router: str):
    routed = built("t5", router)
    batch = pair("mask", 9, 9)
    other = {k: v.clone() for k, v in batch.items()}
    other["input_ids"][batch["attention_mask"] == 0] = 39
    other["decoder_input_ids"][batch["decoder_attention_mask"] == 0] = 39
    counts = batch["decoder_attention_mask"].bool()
    with routing(routed, record=True) as first:
        expected = output(routed, batch)[counts]
    with routing(routed, record=True) as second:
        found = output(routed, other)[counts]
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


PROJECTIONS = ["visual_projection.weight", "text_projection.weight"]


@cache
def clip() -> tuple[nn.Module, Batch]:
    """Return a routed model of two towers, and a batch of as many texts as images."""
    base = world(lambda: tiny_model("CLIPModel"), texts)
    ids = torch.randint(3, 38, (6, 7), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 39
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": 2 * images}
    statistics = {
        name: collect(model, [{**batch, "pixel_values": images + t - 1}])
        for t, (name, model) in enumerate(base.experts.items())
    }
    layers = ["*_proj.weight", *PROJECTIONS]
    routed = build_routed(base.merged, base.state_dicts(), statistics, rank=2, layers=layers)
    assert routed.routing.accumulate  # type: ignore[union-attr]
    return routed, batch


def run_clip(batch: Batch, **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return embeddings of texts and images, and decisions."""
    routed, _ = clip()
    with routing(routed, record=True, **options) as decisions, torch.no_grad():
        found = routed(**batch)
    return found.text_embeds, found.image_embeds, decisions


def halves(decisions: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split decisions into those of the text tower, its projection included, and the others'."""
    parts: tuple[list[Tensor], list[Tensor]] = [], []
    for name, chosen in decisions.items():
        parts[not name.startswith("text_")].append(chosen)
    assert len(parts[0]) == len(parts[1]) == 9
    return parts


MODES = [{}, {"mode": "soft"}, {"mode": "vote"}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", MODES, ids=str)
def test_texts_do_not_inherit_the_evidence_of_images_in_the_same_row(options: dict[str, str]):
    _, batch = clip()
    images = batch["pixel_values"]
    text, image, decisions = run_clip(batch, **options)
    assert {len(v.unique()) for v in decisions.values()} - {1}
    turned = run_clip({**batch, "pixel_values": images.roll(2, 0)}, **options)
    torch.testing.assert_close(turned[0], text)
    assert all(map(torch.equal, halves(turned[2])[0], halves(decisions)[0]))
    torch.testing.assert_close(turned[1], image.roll(2, 0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize(("few", "many"), [(4, 6), (6, 4), (1, 6), (6, 1), (2, 6)])
def test_towers_of_unequal_batches_route_their_own_samples(
    few: int, many: int, options: dict[str, str]
):
    _, batch = clip()
    cut = {k: v[: many if k == "pixel_values" else few] for k, v in batch.items()}
    text, image, decisions = run_clip(batch, **options)
    found = run_clip(cut, **options)
    torch.testing.assert_close(found[0], text[:few])
    torch.testing.assert_close(found[1], image[:many])
    for part, whole, samples in zip(halves(found[2]), halves(decisions), (few, many), strict=True):
        for own, chosen in zip(part, whole, strict=True):
            assert torch.equal(own, chosen[:samples])


@pytest.mark.filterwarnings("ignore")
def test_every_tower_votes_for_itself():
    routed, batch = clip()
    cast = halves(run_clip(batch, mode="base")[2])
    elected = halves(run_clip(batch, mode="vote")[2])
    for votes, chosen in zip(cast, elected, strict=True):
        majority = torch.stack(votes).mode(dim=0).values
        assert all(torch.equal(own, majority) for own in chosen)
    assert not torch.equal(elected[0][0], elected[1][0])
    # A named layer decides for its own tower.
    name = "vision_model.encoder.layers.1.self_attn.v_proj.weight"
    texts_too, images = halves(run_clip(batch, mode="vote", layer=name)[2])
    alone = run_clip(batch, mode="base")[2][name]
    assert all(torch.equal(own, alone) for own in images)
    assert all(map(torch.equal, texts_too, elected[0]))


@pytest.mark.filterwarnings("ignore")
def test_a_projection_goes_on_from_its_own_tower():
    routed, batch = clip()
    layers = {m.name: m for m in routed.modules() if isinstance(m, Experts)}
    with pooled(routed) as seen, torch.no_grad():
        routed(**batch)
    decisions = run_clip(batch, mode="base")[2]
    for prefix, projection in zip(("vision_", "text_"), PROJECTIONS, strict=True):
        order = [name for name in seen if name.startswith(prefix) or name == projection]
        assert order[-1] == projection and len(order) == 9
        total = sum(layers[name].router(seen[name]).log_softmax(-1) for name in order)
        assert isinstance(total, Tensor)
        assert torch.equal(decisions[projection], total.argmax(-1))


def test_a_head_goes_on_from_the_model_below_it_and_a_decoder_from_its_encoder():
    """Scores grow along the layers: the last is the sum of all the log-posteriors before it."""
    routed = built("t5", accumulate=True)
    batch = pair("mask", 9, 6)
    layers = {m.name: m for m in routed.modules() if isinstance(m, Experts)}
    with pooled(routed) as seen:
        output(routed, batch)
    order = list(seen)
    total = sum(layers[name].router(seen[name]).log_softmax(-1) for name in order)
    with routing(routed, mode="base", record=True) as decisions:
        output(routed, batch)
    assert order[-1] == "lm_head.weight" and isinstance(total, Tensor)
    assert torch.equal(decisions["lm_head.weight"], total.argmax(-1))
    assert not all(
        torch.equal(layers[name].router(seen[name]).argmax(-1), decisions[name]) for name in order
    )


class Mixture(nn.Module):
    """A layer that sees all tokens in a row, or those that were sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 8)
        self.fc1 = nn.Linear(8, 8)
        self.tokens: list[int] | None = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        rows = self.embedding(input_ids).flatten(0, 1)
        return self.fc1(rows if self.tokens is None else rows[self.tokens])


def mixture() -> Mixture:
    torch.manual_seed(0)
    model = Mixture()
    statistics = {}
    for name in EXPERTS:
        x = torch.randn(30, 8)
        statistics[name] = {
            "fc1.weight": LayerStatistics(gram=x.T @ x, count=30, input_sum=x.sum(0))
        }
    weights = {
        name: {k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()}
        for name in EXPERTS
    }
    return build_routed(model, weights, statistics, rank=4)


def test_tokens_sent_to_a_layer_are_not_taken_for_samples():
    routed = mixture()
    ids = torch.randint(0, 40, (3, 5))
    for given in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones(3, 5)}):
        routed.tokens = [0, 1, 2, 3, 4, 5]  # six rows divide into three samples, by luck
        with pytest.raises(RequestError, match="do not divide into 3 samples"):
            routed(**given)
        routed.tokens = [0, 1, 2, 3, 4, 5, 6]
        with pytest.raises(RequestError, match="do not divide into 3 samples"):
            routed(**given)
        routed.tokens = None
        together = routed(**given)
        apart = torch.cat([routed(**{k: v[n : n + 1] for k, v in given.items()}) for n in range(3)])
        torch.testing.assert_close(together, apart)
        routed.tokens = [4, 9, 14]  # one row a sample, as pooled inputs are
        assert routed(**given).shape == (3, 8)


def test_an_input_of_one_axis_is_one_token():
    routed = mixture().fc1
    x = torch.randn(8)
    assert routed(x).shape == (8,)
    torch.testing.assert_close(routed(x), routed(x[None, None])[0, 0])
