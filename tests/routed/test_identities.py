"""Routed models keep their identities on every architecture: oracle, mixed batches, padding."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eutectic.errors import RequestError
from eutectic.routed import build_routed, routing, routing_accuracy, routing_accuracy_by_task

from .world import EXPERTS, WORLDS, World, counted, output, single, summed

FULL = 64
IN_TORCH = ["*in_proj_weight", "*linear?.weight"]
LAYERS = {"torch": IN_TORCH, "torch_sequence_first": IN_TORCH}


@cache
def built(kind: str, rank: int = 4, router: str = "discriminant") -> tuple[World, nn.Module]:
    world = WORLDS[kind]()
    routed = build_routed(
        world.merged,
        world.state_dicts(),
        world.statistics(),
        world.statistics(of_merged=True),
        rank=rank,
        router=router,  # type: ignore[arg-type]
        layers=LAYERS.get(kind, ["*"]),
    )
    return world, routed


@pytest.mark.parametrize("kind", list(WORLDS))
def test_oracle_routing_at_full_rank_reproduces_every_expert(kind: str):
    world, routed = built(kind, FULL)
    for t, (name, expert) in enumerate(world.experts.items()):
        batch = world.batch(t, 6, 2)  # of its own task: what its proxy data span
        # Biases and norms are the merged model's, equal to the experts' here; so are embeddings.
        with routing(routed, mode="oracle", expert=name):
            y = counted(routed, batch)
        expected = counted(expert, batch)
        assert not torch.allclose(expected, counted(world.merged, batch), atol=1e-3)
        torch.testing.assert_close(y, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", list(WORLDS))
def test_base_mode_is_the_merged_model(kind: str):
    world, routed = built(kind)
    batch = world.mixed()
    with routing(routed, mode="base"):
        y = counted(routed, batch)
    torch.testing.assert_close(y, counted(world.merged, batch), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["route", "soft", "vote"])
@pytest.mark.parametrize("kind", list(WORLDS))
def test_a_mixed_padded_batch_equals_its_samples_alone(kind: str, mode: str):
    world, routed = built(kind)
    batch = world.mixed()
    with routing(routed, mode=mode, record=True) as together:  # type: ignore[arg-type]
        y = counted(routed, batch)
    with routing(routed, mode=mode, record=True) as alone:  # type: ignore[arg-type]
        expected = torch.cat([counted(routed, sample) for sample in single(batch)])
    assert len({int(i) for i in torch.cat(list(together.values()))}) > 1
    assert together.keys() == alone.keys()
    for layer in together:
        assert torch.equal(together[layer], alone[layer]), layer
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "torch", "torch_sequence_first"])
def test_what_stands_in_the_padding_changes_nothing(kind: str):
    world, routed = built(kind)
    batch = world.mixed()
    other = copy.deepcopy(batch)
    other["input_ids"][batch["attention_mask"] == 0] = 39
    torch.testing.assert_close(counted(routed, other), counted(routed, batch), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", list(WORLDS))
def test_the_discriminant_router_finds_the_task(kind: str):
    world, routed = built(kind)
    with routing(routed, record=True) as decisions:
        output(routed, world.mixed(30))
    # Every architecture has a first layer whose inputs tell the tasks apart.
    table = routing_accuracy(decisions, world.labels(30))
    assert max(table.values()) > 0.9
    assert len(table) == sum(1 for _ in decisions)


def test_accuracy_is_told_task_by_task():
    world, routed = built("bert", router="prototype")
    labels = world.labels(7)
    with routing(routed, record=True) as decisions:
        output(routed, world.mixed(7))
    names = routed.routing.experts
    table = routing_accuracy_by_task(decisions, labels, names)
    assert list(table) == list(decisions) and set(names) == set(EXPERTS)
    for layer, chosen in decisions.items():
        for t, name in enumerate(names):
            own = [int(c) == t for c, label in zip(chosen, labels, strict=True) if label == t]
            assert table[layer][name] == pytest.approx(sum(own) / 7)
    overall = routing_accuracy(decisions, labels)
    for layer, shares in table.items():
        assert sum(shares.values()) / 3 == pytest.approx(overall[layer])
    assert len({share for shares in table.values() for share in shares.values()}) > 2
    some = {layer: chosen[:1] for layer, chosen in decisions.items()}
    assert {tuple(v) for v in routing_accuracy_by_task(some, [0], names).values()} == {("a",)}
    with pytest.raises(RequestError, match="labels \\[3\\] are no experts"):
        routing_accuracy_by_task(decisions, [3] * 21, names)
    with pytest.raises(RequestError, match="decided for 21 samples, but there are 2 labels"):
        routing_accuracy_by_task(decisions, [0, 1], names)


@pytest.mark.parametrize("kind", list(WORLDS))
def test_oracle_per_sample_equals_oracle_per_batch(kind: str):
    world, routed = built(kind)
    batch = world.mixed(2)
    names = [EXPERTS[i] for i in world.labels(2)]
    with routing(routed, mode="oracle", expert=names):
        mixed = output(routed, batch)
    for t, name in enumerate(EXPERTS):
        with routing(routed, mode="oracle", expert=name):
            alone = output(routed, batch)
        rows = [n for n, label in enumerate(world.labels(2)) if label == t]
        torch.testing.assert_close(mixed[rows], alone[rows], atol=1e-5, rtol=1e-4)


def test_sharp_soft_routing_is_routing():
    world, routed = built("bert")
    batch = world.mixed()
    with routing(routed, mode="soft", temperature=1e-6):
        soft = counted(routed, batch)
    torch.testing.assert_close(soft, counted(routed, batch), atol=1e-6, rtol=1e-5)


def test_a_named_layer_votes_for_the_network():
    world, routed = built("bert")
    layer = "encoder.layer.0.intermediate.dense.weight"
    batch = world.mixed()
    with routing(routed, mode="base", record=True) as base:
        output(routed, batch)
    with routing(routed, mode="vote", layer=layer, record=True) as vote:
        output(routed, batch)
    assert all(torch.equal(chosen, base[layer]) for chosen in vote.values())


def test_decisions_of_several_batches_are_joined():
    world, routed = built("bert")
    first, second = world.mixed(2), world.mixed(3, seed=7)
    with routing(routed, record=True) as decisions:
        output(routed, first)
        output(routed, second)
    assert {len(v) for v in decisions.values()} == {15}


def test_autocast_and_bfloat16_stay_near():
    world, routed = built("bert")
    batch = world.mixed()
    with routing(routed, mode="oracle", expert="b"):
        exact = counted(routed, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = counted(routed, batch)
        half = copy.deepcopy(routed).to(torch.bfloat16)
        with routing(half, mode="oracle", expert="b"):
            low = counted(half, batch)
    assert float((mixed.float() - exact).norm() / exact.norm()) < 0.03
    assert float((low.float() - exact).norm() / exact.norm()) < 0.03
    routers = [b for n, b in half.named_buffers() if ".router." in n]
    assert routers and all(b.dtype == torch.float32 for b in routers)


def test_gradients_flow_through_routed_layers():
    world, routed = built("bert")
    model = copy.deepcopy(routed)
    weight = model.get_submodule("encoder.layer.0.attention.self.query").weight
    model(**world.mixed()).last_hidden_state.square().mean().backward()
    assert weight.grad is not None and float(weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_routing_in_low_precision_stays_near(kind: str):
    world, routed = built(kind)
    batch = world.mixed()
    with routing(routed, record=True) as exact:
        expected = counted(routed, batch)
    with routing(routed, record=True) as mixed, torch.autocast("cpu", dtype=torch.bfloat16):
        cast = counted(routed, batch)
    half = copy.deepcopy(routed).to(torch.bfloat16)
    with routing(half, record=True) as low:
        rounded = counted(half, batch)
    for y in (cast, rounded):
        assert float((y.float() - expected).norm() / expected.norm()) < 0.05
    for decisions in (mixed, low):
        same = [(decisions[layer] == exact[layer]).double().mean() for layer in exact]
        assert float(torch.stack(same).mean()) > 0.95


def parted(router: str) -> tuple[World, nn.Module, nn.Module]:
    """One expert, which differs from the merged model."""
    world = WORLDS["bert"]()
    routed = build_routed(
        world.merged,
        {"a": world.state_dicts()["a"]},
        {"a": world.statistics()["a"]},
        rank=FULL,
        router=router,  # type: ignore[arg-type]
        layers=["*"],
    )
    return world, routed, world.experts["a"]


@pytest.mark.parametrize("router", ["discriminant", "prototype"])
def test_the_only_expert_is_always_chosen(router: str):
    world, routed, expert = parted(router)
    batch = world.batch(0, 6, 2)
    with routing(routed, record=True) as decisions:
        y = counted(routed, batch)
    assert decisions and not any(bool(chosen.any()) for chosen in decisions.values())
    with routing(routed, mode="oracle", expert="a"):
        torch.testing.assert_close(y, counted(routed, batch), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(y, counted(expert, batch), atol=2e-4, rtol=1e-3)
    assert not torch.allclose(y, counted(world.merged, batch), atol=1e-3)


class Sizes(TorchDispatchMode):
    """Notes how many elements every intermediate result has."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                self.seen.add(item.numel())
        return result


@pytest.mark.parametrize("mode", ["route", "soft", "vote", "oracle"])
def test_no_dense_expert_is_ever_formed(mode: str):
    """Not for all experts (T·out·in elements), and not one for every sample (N·out·in)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(26, 22))
    names = [f"e{t}" for t in range(7)]
    weights, statistics = {}, {}
    for name in names:
        weights[name] = {k: v + torch.randn_like(v) for k, v in model.state_dict().items()}
        x = torch.randn(40, 26) + torch.randn(26)
        statistics[name] = {"0.weight": summed([row[None].double() for row in x])}
    routed = build_routed(model, weights, statistics, rank=3, layers=["*"])
    x = torch.randn(5, 4, 26)
    named = names[:5] if mode == "oracle" else None
    # Few tokens a sample and many take different paths.
    for tokens in (x[:, :1], x[:, :2], x):
        with Sizes() as sizes, torch.no_grad(), routing(routed, mode=mode, expert=named):  # type: ignore[arg-type]
            assert routed(tokens).shape == (*tokens.shape[:2], 22)
        assert 5 * tokens.shape[1] * 22 in sizes.seen  # the output: the forward pass was watched
        # The base weight itself appears, as a view; experts would be several of its size.
        assert not sizes.seen & {26 * 22 * n for n in range(2, 7 * 5 + 1)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("mode", "expert"),
    [("route", None), ("oracle", list("abc") * 4)],
)
def test_models_compiled_ahead_of_time_agree(mode: str, expert: Any):
    world, routed = built("bert")
    batch = world.mixed()
    torch._dynamo.reset()
    compiled = torch.compile(routed, backend="aot_eager")
    with (
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
        routing(routed, mode=mode, expert=expert),  # type: ignore[arg-type]
    ):
        found, expected = counted(compiled, batch), counted(routed, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, counted(world.merged, batch), atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_models_agree():
    world, routed = built("bert")
    batch = world.mixed()
    torch._dynamo.reset()
    compiled = torch.compile(routed, backend="eager")
    # Fails where something is compiled anew for each of the ten layers.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for mode in ("route", "base"):
            with routing(routed, mode=mode):  # type: ignore[arg-type]
                torch.testing.assert_close(
                    counted(compiled, batch), counted(routed, batch), atol=1e-5, rtol=1e-4
                )
