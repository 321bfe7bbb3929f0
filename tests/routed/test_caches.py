"""Decoding with a cache goes on with the prompt's experts, whatever the cache is called."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from eutectic.errors import RequestError
from eutectic.models.arguments import given_cache, is_cache, returned_cache, signature_of
from eutectic.routed import build_routed, routing

from .world import llama, mamba, t5, texts

pytestmark = pytest.mark.transformers_versions
transformers: Any = pytest.importorskip("transformers")


def prompts() -> dict[str, torch.Tensor]:
    parts = [texts(t, 1, 3, left=True) for t in range(3)]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


def built(kind: str, **options: Any) -> nn.Module:
    world = {"llama": llama, "mamba": mamba, "t5": t5}[kind]()
    collected = world.statistics(), world.statistics(of_merged=True)
    return build_routed(world.merged, world.state_dicts(), *collected, rank=4, **options)


def generate(model: Any, **options: Any) -> torch.Tensor:
    return model.generate(
        **prompts(), min_new_tokens=6, max_new_tokens=6, do_sample=False, **options
    )


@pytest.mark.parametrize("mode", ["route", "soft", "vote"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_three_prompts_are_three_decisions_and_the_text_is_that_without_a_cache(kind: str, mode):
    routed = built(kind)
    if kind == "t5" and not _caches_are_objects(routed):
        with routing(routed, mode=mode), pytest.raises(RequestError, match="needs a cache object"):
            generate(routed)
        return
    with routing(routed, mode=mode, record=True) as decisions:
        cached = generate(routed)
    assert decisions
    assert all(len(chosen) == 3 for chosen in decisions.values())
    # Each prompt is of another task, and so are most decisions.
    assert any(len(chosen.unique()) == 3 for chosen in decisions.values())
    with routing(routed, mode=mode):
        plain = generate(routed, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("mode", ["route", "soft", "vote"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_what_is_generated_does_not_move_the_decision_without_a_cache(kind: str, mode):
    """Prompts between two tasks, whose answers would be decided otherwise than they are."""
    routed = built(kind)
    if kind == "t5" and not _caches_are_objects(routed):
        return
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        ids = torch.randint(3, 60, (4, 3), generator=generator) % prompts()["input_ids"].max()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        more = {"min_new_tokens": 12, "max_new_tokens": 12, "do_sample": False}
        with routing(routed, mode=mode):
            cached = routed.generate(**inputs, **more)  # type: ignore[operator]
            plain = routed.generate(**inputs, **more, use_cache=False)  # type: ignore[operator]
        assert torch.equal(cached, plain)


def test_states_of_recurrent_models_are_caches():
    routed = built("mamba", layers=["*.in_proj.weight"])
    inputs = {"input_ids": prompts()["input_ids"]}
    with routing(routed, record=True) as decisions, torch.no_grad():
        routed.generate(**inputs, min_new_tokens=3, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    assert decisions and all(len(chosen) == 3 for chosen in decisions.values())


def test_a_cache_is_known_by_what_it_is():
    """A version that renames the argument once more is served as well."""
    routed = built("llama")
    expected = _two_steps(copy.deepcopy(routed), _name_of_cache(routed))
    called = _name_of_cache(routed)
    forward = routed.forward

    def renamed(input_ids=None, attention_mask=None, memory=None, **kwargs):
        return forward(
            input_ids=input_ids, attention_mask=attention_mask, **{called: memory}, **kwargs
        )

    routed.forward = renamed  # type: ignore[method-assign]
    assert torch.equal(_two_steps(routed, "memory"), expected)


def _two_steps(routed: Any, name: str) -> torch.Tensor:
    """Return the logits of a second call that goes on from the cache of a first."""
    inputs, cache = prompts(), transformers.DynamicCache()
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    with torch.no_grad(), routing(routed, mode="vote", record=True) as decisions:
        routed(**inputs, **{name: cache}, use_cache=True)
        logits = routed(
            input_ids=torch.tensor([[3], [3], [3]]), attention_mask=mask, **{name: cache}
        ).logits
    assert all(len(chosen) == 3 for chosen in decisions.values())
    return logits


def test_a_cache_of_tuples_is_refused_where_decisions_would_be_taken_anew():
    routed = built("llama")
    token = torch.tensor([[3], [3], [3]])
    past = ((torch.zeros(3, 1, 4, 8), torch.zeros(3, 1, 4, 8)),)
    with pytest.raises(RequestError, match="needs a cache object, got a tuple"):
        routed(input_ids=token, **{_name_of_cache(routed): past})


def test_what_is_no_cache():
    for value in (None, torch.zeros(2), {"cache": 1}, "Cache", [torch.zeros(2)]):
        assert not is_cache(value)
    assert given_cache({"attention_mask": torch.ones(2, 2), "past_key_values": ()}) is None
    assert returned_cache((torch.zeros(2), (torch.zeros(2),))) is None
    cache = transformers.DynamicCache()
    assert given_cache({"anything": cache}) is cache
    assert returned_cache({"logits": torch.zeros(2), "anything": cache}) is cache


def _name_of_cache(model: Any) -> str:
    names = signature_of(model).names
    return next(name for name in ("cache", "past_key_values") if name in names)


def _caches_are_objects(model: Any) -> bool:
    """Tell whether this version's T5 keeps its past in an object."""
    return "Cache" in inspect.getsource(inspect.getmodule(type(model)))  # type: ignore[arg-type]
