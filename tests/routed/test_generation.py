"""Generation: route on the prompt, keep the decision while decoding, for every kind of decoder."""

from __future__ import annotations

import copy
import threading
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from eutectic.errors import RequestError
from eutectic.routed import build_routed, routing
from eutectic.routed.routed_modules import RoutedLinear

from .world import EXPERTS, WORLDS, World, output, texts


@cache
def built(
    kind: str, accumulate: bool | None = True, router: Any = "discriminant"
) -> tuple[World, nn.Module]:
    world = WORLDS[kind]()
    routed = build_routed(
        world.merged,
        world.state_dicts(),
        world.statistics(),
        world.statistics(of_merged=True),
        rank=4,
        router=router,
        accumulate=accumulate,
    )
    return world, routed


def prompts(kind: str, samples: int = 2) -> dict[str, torch.Tensor]:
    parts = [texts(t, samples, 3, left=kind == "gpt2") for t in range(3)]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def generate(model: nn.Module, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(  # type: ignore[operator]
        **inputs, min_new_tokens=6, max_new_tokens=6, **options
    )


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_every_prompt_is_decided_once(kind: str):
    _, routed = built(kind)
    with routing(routed, record=True) as decisions:
        generate(routed, prompts(kind))
    assert decisions
    assert {len(chosen) for chosen in decisions.values()} == {6}


def test_decoding_keeps_the_prompts_decision():
    _, routed = built("gpt2")
    inputs = prompts("gpt2")
    with routing(routed, record=True) as decisions:
        tokens = generate(routed, inputs)
    # A second forward over the prompt decides alike; with that expert named, layer by layer alike
    # for the whole answer, the answer is the same as that of the cached decoding.
    with routing(routed, record=True) as again:
        output(routed, {**inputs, "position_ids": positions(inputs)})
    assert all(torch.equal(decisions[layer], again[layer]) for layer in decisions)
    for name in EXPERTS:
        with routing(routed, mode="oracle", expert=name):
            cached = generate(routed, inputs)
            plain = generate(routed, inputs, use_cache=False)
        assert torch.equal(cached, plain)
    assert tokens.shape == (6, 15)


def positions(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_a_batch_of_prompts_answers_as_each_prompt_alone(kind: str):
    _, routed = built(kind)
    inputs = prompts(kind)
    together = generate(routed, inputs)
    for n in range(6):
        keep = inputs["attention_mask"][n].bool()
        alone = {k: v[n : n + 1, keep] for k, v in inputs.items()}
        assert torch.equal(generate(routed, alone)[0, -6:], together[n, -6:])


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_beams_and_several_answers_take_their_prompts_expert(kind: str):
    _, routed = built(kind)
    inputs = prompts(kind)
    beams = generate(routed, inputs, num_beams=3)
    for n in range(6):
        alone = {k: v[n : n + 1] for k, v in inputs.items()}
        assert torch.equal(generate(routed, alone, num_beams=3)[0, -6:], beams[n, -6:])
    several = generate(routed, inputs, do_sample=True, num_return_sequences=2)
    assert len(several) == 12


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_an_oracle_per_prompt_covers_its_beams(kind: str):
    _, routed = built(kind)
    inputs = prompts(kind)
    names = [name for name in EXPERTS for _ in range(2)]
    with routing(routed, mode="oracle", expert=names):
        mixed = generate(routed, inputs, num_beams=2)
    for t, name in enumerate(EXPERTS):
        with routing(routed, mode="oracle", expert=name):
            alone = generate(
                routed, {k: v[2 * t : 2 * t + 2] for k, v in inputs.items()}, num_beams=2
            )
        assert torch.equal(alone[:, -6:], mixed[2 * t : 2 * t + 2, -6:])


@pytest.mark.parametrize("mode", ["soft", "vote"])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_other_modes_generate(kind: str, mode: str):
    _, routed = built(kind)
    inputs = prompts(kind)
    with routing(routed, mode=mode):  # type: ignore[arg-type]
        together = generate(routed, inputs)
        alone = generate(routed, {k: v[:1] for k, v in inputs.items()})
    assert torch.equal(alone[0, -6:], together[0, -6:])


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_generation_in_bfloat16_decides_as_in_float32(kind: str):
    _, routed = built(kind)
    inputs = prompts(kind)
    half = copy.deepcopy(routed).to(torch.bfloat16)
    with routing(routed, record=True) as exact:
        generate(routed, inputs)
    for model, cast in ((half, False), (routed, True)):
        with (
            routing(model, record=True) as decisions,
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast),
        ):
            tokens = generate(model, inputs)
        assert len(tokens) == 6 and tokens.dtype == torch.long
        assert {len(chosen) for chosen in decisions.values()} == {6}  # prompts only
        same = [(decisions[layer] == exact[layer]).double().mean() for layer in exact]
        assert float(torch.stack(same).mean()) > 0.9


def test_an_encoder_run_by_itself_hands_its_evidence_to_the_decoder():
    _, routed = built("t5")
    inputs = prompts("t5")
    with routing(routed, record=True) as decisions:
        generate(routed, inputs)
    last_encoder = [n for n in decisions if n.startswith("encoder")][-1]
    first_decoder = next(n for n in decisions if n.startswith("decoder"))
    right = torch.tensor([0, 0, 1, 1, 2, 2])
    assert float((decisions[last_encoder] == right).double().mean()) > 0.8
    # The decoder's only token is the start token, which by itself says nothing about the task.
    assert torch.equal(decisions[first_decoder], decisions[last_encoder])


@pytest.mark.parametrize("accumulate", [True, False])
def test_an_encoder_run_by_itself_votes_for_the_decoder_too(accumulate: bool):
    _, routed = built("t5", accumulate)
    with routing(routed, mode="vote", record=True) as decisions:
        generate(routed, prompts("t5"), num_beams=2)
    votes = [chosen for name, chosen in decisions.items() if name.startswith("encoder")]
    beams = [chosen for name, chosen in decisions.items() if name.startswith("decoder")]
    assert len(votes[0].unique()) > 1
    assert all(torch.equal(chosen, votes[0]) for chosen in votes)
    assert all(torch.equal(chosen, votes[0].repeat_interleave(2)) for chosen in beams)


def encoded(routed: Any, **settings: Any) -> Any:
    with torch.no_grad(), routing(routed, **settings):
        return routed.encoder(**prompts("t5"))


def decoded(routed: Any, outputs: Any, **settings: Any) -> torch.Tensor:
    """The decoder's logits of two tokens, from an encoder's outputs."""
    start = torch.tensor([[0, 5]]).expand(len(outputs[0]), -1)
    mask = prompts("t5")["attention_mask"]
    with torch.no_grad(), routing(routed, **settings):
        return routed(
            encoder_outputs=outputs, attention_mask=mask, decoder_input_ids=start, use_cache=False
        ).logits


def named(routed: Any, chosen: torch.Tensor) -> dict[str, Any]:
    return {"mode": "oracle", "expert": [routed.routing.experts[t] for t in chosen.tolist()]}


def test_a_decoder_in_another_mode_than_its_encoder_decides_by_its_own():
    """An encoder leaves scores: weights of `soft` are no decision of `route`, and conversely."""
    routed: Any = copy.deepcopy(built("t5", accumulate=None, router="mad")[1])
    layers = {m.experts.name: m for m in routed.modules() if isinstance(m, RoutedLinear)}
    seen: list[torch.Tensor] = []
    deciding = layers[routed.routing.decider].experts.router
    handle = deciding.register_forward_hook(lambda module, args, scores: seen.append(scores))
    encoded(routed, mode="base", record=True)
    handle.remove()
    scores = seen[0]
    temperature = float((scores.max(1).values - scores.min(1).values).max())
    soft = {"mode": "soft", "temperature": temperature}
    mixed = encoded(routed, **soft)
    assert torch.equal(
        decoded(routed, mixed, mode="route"),
        decoded(routed, mixed, **named(routed, scores.argmax(1))),
    )
    weights = (scores / (2 * temperature)).softmax(1)
    for encoding in ({"mode": "route"}, {"mode": "vote"}, soft):
        outputs = encoded(routed, **encoding)
        found = decoded(routed, outputs, mode="soft", temperature=2 * temperature)
        plain = copy.deepcopy(routed)
        for layer in plain.decoder.modules():  # the first prompt's mixture as one dense change
            if isinstance(layer, RoutedLinear):
                up, down = layer.experts.up, layer.experts.down
                layer.weight.data += torch.einsum("t,tor,tri->oi", weights[0], up, down)
        wanted = decoded(plain, outputs, mode="base")
        torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)


def test_a_decoder_votes_anew_where_another_layer_is_to_decide():
    routed: Any = copy.deepcopy(built("t5", accumulate=False)[1])
    layers = {m.experts.name: m for m in routed.modules() if isinstance(m, RoutedLinear)}
    other = "encoder.block.0.layer.0.SelfAttention.k.weight"
    of_decoder = "decoder.block.0.layer.1.EncDecAttention.k.weight"
    for name, turns in ((other, 1), (of_decoder, 2)):  # these two contradict all the rest
        layers[name].experts.router.register_forward_hook(
            lambda module, args, scores, turns=turns: scores.roll(turns, -1)
        )
    with routing(routed, mode="base", record=True) as alone:
        routed(**prompts("t5"), decoder_input_ids=torch.zeros(6, 1, dtype=torch.long))
    cast = torch.stack([alone[name] for name in alone if name.startswith("encoder")])
    most = torch.nn.functional.one_hot(cast, 3).sum(0).argmax(1)
    assert not torch.equal(alone[other], most)
    for encoding, decoding, wanted in (
        ({"layer": other}, {}, most),
        ({}, {"layer": other}, alone[other]),
        ({}, {"layer": of_decoder}, alone[of_decoder]),
    ):
        outputs = encoded(routed, mode="vote", **encoding)
        found = decoded(routed, outputs, mode="vote", **decoding)
        assert torch.equal(found, decoded(routed, outputs, **named(routed, wanted)))
    with pytest.raises(RequestError, match="was not passed, so it cannot vote"):
        decoded(routed, encoded(routed, mode="route"), mode="vote", layer=other)


def test_a_vote_is_evidence_for_a_decoder_that_adds_it_up():
    routed: Any = built("t5")[1]
    with routing(routed, mode="base", record=True) as alone:
        routed.encoder(**prompts("t5"))
    last = [*alone.values()][-1]
    outputs = encoded(routed, mode="vote")
    start = torch.zeros(len(last), 1, dtype=torch.long)
    with torch.no_grad(), routing(routed, record=True) as decisions:
        routed(encoder_outputs=outputs, decoder_input_ids=start, use_cache=False)
    assert torch.equal(next(iter(decisions.values())), last)


def test_threads_do_not_see_each_other():
    _, routed = built("gpt2")
    inputs = prompts("gpt2")
    expected, found = {}, {}
    for name in EXPERTS:
        with routing(routed, mode="oracle", expert=name):
            expected[name] = output(routed, inputs)

    def work(name: str) -> None:
        with routing(routed, mode="oracle", expert=name):
            found[name] = [output(routed, inputs) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(name,)) for name in EXPERTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in EXPERTS:
        assert all(torch.equal(y, expected[name]) for y in found[name])


def test_an_oracle_of_another_batch_size_is_refused():
    _, routed = built("gpt2")
    with routing(routed, mode="oracle", expert=["a", "b"]):
        with pytest.raises(RequestError, match="names 2 experts for a batch of 6"):
            output(routed, {**prompts("gpt2"), "use_cache": False})
        # The failed pass leaves nothing behind.
        output(routed, {k: v[:2] for k, v in prompts("gpt2").items()})
