"""Generation: route on the prompt, keep the decision while decoding, for every kind of decoder."""

from __future__ import annotations

import copy
import threading
from functools import cache

import pytest
import torch
from torch import nn

from eutectic.errors import RequestError
from eutectic.routed import build_routed, routing

from .world import EXPERTS, WORLDS, World, output, texts


@cache
def built(kind: str, accumulate: bool = True) -> tuple[World, nn.Module]:
    world = WORLDS[kind]()
    routed = build_routed(
        world.merged,
        world.state_dicts(),
        world.statistics(),
        world.statistics(of_merged=True),
        rank=4,
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
