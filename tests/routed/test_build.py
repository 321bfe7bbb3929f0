"""Building: what is installed where, what it costs, and every request that cannot be met."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import eutectic
from eutectic.errors import NumericalError, RequestError, StatisticsError
from eutectic.routed import RoutedAttention, RoutedLinear, build_routed, routed_costs, routing
from eutectic.types import LayerStatistics

from .world import WORLDS, World, bert, counted, torch_encoder


@pytest.fixture(scope="module")
def world() -> World:
    return bert()


def build(world: World, **options) -> nn.Module:
    given = {
        "experts": world.state_dicts(),
        "statistics": world.statistics(),
        "rank": 4,
        **options,
    }
    return build_routed(world.merged, **given)


def test_the_public_names_lead_here():
    assert eutectic.build_routed is build_routed
    assert eutectic.routing is routing


@pytest.mark.parametrize(
    ("kind", "layers"), [("bert", 2 * 5), ("gpt2", 2 * 3), ("t5", 2 * 5 + 2 * 9), ("clip", 2 * 5)]
)
def test_default_layers_are_attention_and_the_first_mlp_matrix(kind: str, layers: int):
    world = WORLDS[kind]()
    costs = routed_costs(world.merged, experts=3, rank=4)
    assert costs.layers == layers


def test_default_layers_of_torch_modules():
    merged = torch_encoder().merged
    assert routed_costs(merged, experts=2, rank=4).layers == 2 * 3


def test_the_model_itself_is_left_alone(world: World):
    before = copy.deepcopy(world.merged.state_dict())
    routed = build(world)
    assert not any(isinstance(m, RoutedLinear) for m in world.merged.modules())
    assert all(torch.equal(before[k], v) for k, v in world.merged.state_dict().items())
    assert type(routed) is type(world.merged) and routed.config is not None


def test_costs_are_what_is_installed(world: World):
    costs = routed_costs(world.merged, experts=3, rank=4)
    routed = build(world)
    parameters = sum(p.numel() for p in routed.parameters())
    routers = [b for n, b in routed.named_buffers() if ".router." in n]
    added = parameters - costs.model_parameters + sum(b.numel() for b in routers)
    assert added == costs.parameters
    assert costs.nbytes == 4 * costs.parameters
    assert costs.multiply_adds_per_token == 2 * (4 * 4 * (16 + 16) + 4 * (16 + 32))
    assert costs.multiply_adds_per_sample == 2 * 5 * 3 * 16
    assert costs.model_multiply_adds_per_token == 2 * (4 * 16 * 16 + 2 * 16 * 32) + 16 * 16


def test_experts_are_the_leading_directions_of_the_shift(world: World):
    routed = build(world, layers="encoder.layer.0.intermediate*", rank=3)
    assert sum(isinstance(m, RoutedLinear) for m in routed.modules()) == 1  # one glob, by itself
    name = "encoder.layer.0.intermediate.dense"
    layer = routed.get_submodule(name)
    for t, (expert, model) in enumerate(world.experts.items()):
        residual = model.get_submodule(name).weight - world.merged.get_submodule(name).weight
        residual = residual.detach().double()
        gram = world.statistics()[expert][f"{name}.weight"].gram
        assert gram is not None
        _, vectors = torch.linalg.eigh(residual @ gram @ residual.T)
        expected = vectors[:, -3:] @ (vectors[:, -3:].T @ residual)
        found = (layer.experts.up[t] @ layer.experts.down[t]).double()
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_the_router_follows_the_statistics_there_are(world: World):
    assert build(world).routing.router == "discriminant"
    plain = {
        name: {
            k: dataclasses.replace(v, pooled_sum=None, pooled_gram=None, sample_count=0)
            for k, v in entries.items()
        }
        for name, entries in world.statistics().items()
    }
    routed = build(world, statistics=plain)
    assert routed.routing.router == "prototype" and not routed.routing.accumulate
    with pytest.raises(StatisticsError, match="expert 'a': no pooled sums"):
        build(world, statistics=plain, router="discriminant")
    name = "encoder.layer.1.attention.self.key.weight"
    silent = dataclasses.replace(plain["b"][name], input_sum=torch.zeros(16))
    with pytest.raises(StatisticsError, match="prototypes of expert 'b' have norm zero"):
        build(world, statistics={**plain, "b": {**plain["b"], name: silent}})


def test_names_with_another_prefix_meet(world: World):
    prefixed = {
        name: {f"bert.{k}": v for k, v in entries.items()}
        for name, entries in world.statistics().items()
    }
    weights = {
        name: {f"bert.{k}": v for k, v in sd.items()} for name, sd in world.state_dicts().items()
    }
    batch = world.mixed()
    expected = counted(build(world), batch)
    found = counted(build(world, statistics=prefixed, experts=weights), batch)
    assert torch.equal(found, expected)


def test_few_tokens_are_said(world: World):
    name = "encoder.layer.0.attention.self.query.weight"
    few = world.statistics()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, generator=g)
    few["b"][name] = dataclasses.replace(few["b"][name], gram=x.T @ x, count=2)
    routed = build(world, statistics=few, layers=[name])
    assert routed.routing.short == {name: {"b": 2}}
    assert build(world, layers=[name]).routing.short == {}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_experts_are_read_from_folders_and_adapters(world: World, tmp_path: Path):
    from peft import LoraConfig, get_peft_model

    batch = world.mixed()
    world.merged.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    paths, weights = {}, {}
    for t, (name, model) in enumerate(world.experts.items()):
        paths[name] = tmp_path / name
        if t == 0:
            config = LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights=False)
            adapted = get_peft_model(copy.deepcopy(world.merged), config)  # type: ignore[arg-type]
            adapted.save_pretrained(paths[name])
            weights[name] = adapted.merge_and_unload().state_dict()
        else:
            model.save_pretrained(paths[name])  # type: ignore[operator]
            weights[name] = model.state_dict()
    expected = counted(build(world, experts=weights, rank=16), batch)
    found = build(world, experts=paths, base=tmp_path / "base", rank=16)
    torch.testing.assert_close(counted(found, batch), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(RequestError, match="'a' is an adapter"):
        build(world, experts=paths)


def test_one_expert_and_an_expert_equal_to_the_merged_model(world: World):
    alone = build_routed(
        world.merged,
        {"a": world.merged.state_dict()},
        {"a": world.statistics(of_merged=True)["a"]},
        rank=4,
    )
    batch = world.mixed()
    torch.testing.assert_close(counted(alone, batch), counted(world.merged, batch))


def test_requests_that_cannot_be_met(world: World):
    stats = world.statistics()
    with pytest.raises(RequestError, match=r"missing for \['c'\](.|\n)*eutectic collect"):
        build(world, statistics={k: stats[k] for k in "ab"})
    with pytest.raises(RequestError, match=r"given for \['d'\]"):
        build(world, statistics={**stats, "d": stats["a"]})
    with pytest.raises(RequestError, match="at least one expert"):
        build(world, experts={}, statistics={})
    with pytest.raises(RequestError, match="rank must be at least 1"):
        build(world, rank=0)
    with pytest.raises(RequestError, match="no layer to route"):
        build(world, layers=["*nothing*"])
    with pytest.raises(RequestError, match="routed already"):
        build_routed(build(world), world.state_dicts(), stats)
    with pytest.raises(RequestError, match="shrinkage belongs to the discriminant router"):
        build(world, router="prototype", shrinkage=0.5)
    with pytest.raises(RequestError, match="unknown router 'cosine'"):
        build(world, router="cosine")
    with pytest.raises(RequestError, match="expert 'b' has no tensor"):
        weights = world.state_dicts()
        partial = {k: v for k, v in weights["b"].items() if "query" not in k}
        build(world, experts={**weights, "b": partial})
    with pytest.raises(NumericalError, match="expert 'a'"):
        weights = {k: v.clone() for k, v in world.state_dicts()["a"].items()}
        weights["encoder.layer.0.attention.self.query.weight"][0, 0] = float("nan")
        build(world, experts={**world.state_dicts(), "a": weights})


def test_statistics_of_another_model_are_refused(world: World):
    name = "encoder.layer.0.attention.self.query.weight"
    wrong = world.statistics()
    wrong["b"][name] = LayerStatistics(gram=torch.eye(17), count=17)
    with pytest.raises(StatisticsError, match=r"expert 'b'.*17 inputs"):
        build(world, statistics=wrong, layers=[name], router_statistics=world.statistics())
    lacking = world.statistics()
    del lacking["c"][name]
    with pytest.raises(StatisticsError, match=f"expert 'c' hold nothing for {name}"):
        build(world, statistics=lacking)


def test_statistics_of_each_other_are_refused(world: World):
    from eutectic.statistics import collect

    own = {
        name: collect(model, [world.batch(t, 12, 1)])
        for t, (name, model) in enumerate(world.experts.items())
    }
    build(world, statistics=own)
    swapped = {**own, "a": own["b"], "b": own["a"]}
    with pytest.raises(StatisticsError, match="expert 'a'.*collected on another checkpoint"):
        build(world, statistics=swapped)
    with pytest.raises(StatisticsError, match="router's data of 'a'.*collected on another"):
        build(world, statistics=own, router_statistics=own)
    build(world, statistics=swapped, statistics_of="any")


def test_an_output_projection_needs_its_in_projection():
    world = torch_encoder()
    with pytest.raises(RequestError, match="only together with its in-projection"):
        build(world, layers=["*self_attn.out_proj.weight"])


def test_torch_attention_is_routed_in_both_projections():
    from eutectic.statistics import collect

    world = torch_encoder()
    for t, model in enumerate(world.experts.values()):
        with torch.no_grad():
            for p in model.encoder.layers.parameters():  # type: ignore[union-attr]
                p.add_(0.05 * torch.randn(p.shape) * (p.ndim == 2))
        world.batch(t, 1, 0)
    statistics = {
        name: collect(model, [world.batch(t, 40, 1)])
        for t, (name, model) in enumerate(world.experts.items())
    }
    routed = build(world, statistics=statistics, layers=["encoder.*"], rank=64)
    attention = routed.get_submodule("encoder.layers.0.self_attn")
    assert isinstance(attention, RoutedAttention)
    assert isinstance(attention.out_proj, RoutedLinear)
    for t, (name, model) in enumerate(world.experts.items()):
        batch = world.batch(t, 6, 2)
        with routing(routed, mode="oracle", expert=name):
            torch.testing.assert_close(
                counted(routed, batch), counted(model, batch), atol=2e-4, rtol=1e-3
            )


class TorchDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.layers(x, y)


def test_packed_cross_attention_is_left_out_of_the_default_layers(tmp_path: Path):
    from eutectic.routed import load_routed
    from eutectic.statistics import collect

    torch.manual_seed(0)
    model = TorchDecoder().eval()
    expert = copy.deepcopy(model)
    with torch.no_grad():
        for p in expert.parameters():
            if p.ndim == 2:
                p.add_(0.05 * torch.randn_like(p))
    x, y = torch.randn(8, 5, 16), torch.randn(8, 7, 16)
    weights, statistics = {"a": expert.state_dict()}, {"a": collect(expert, [[x, y]])}
    routed = build_routed(model, weights, statistics, rank=4)
    left_out = ["layers.multihead_attn.in_proj_weight", "layers.multihead_attn.out_proj.weight"]
    assert routed.routing.left_out == left_out
    assert isinstance(routed.layers.self_attn, RoutedAttention)
    assert type(routed.layers.multihead_attn) is nn.MultiheadAttention
    with torch.no_grad():
        found = routed(x, y)
        assert not torch.allclose(found, model(x, y), atol=1e-3)
    routed.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = load_routed(tmp_path, TorchDecoder().eval())
    assert loaded.routing.left_out == left_out
    with torch.no_grad():
        assert torch.equal(loaded(x, y), found)
    prefixed = {"a": {f"net.{k}": v for k, v in statistics["a"].items()}}
    assert build_routed(model, weights, prefixed, rank=4).routing.left_out == left_out
    with pytest.raises(
        StatisticsError, match="'a' hold layers.multihead_attn.in_proj_weight in parts"
    ):
        build_routed(model, weights, statistics, rank=4, layers=["*multihead_attn*"])


def added(routed: nn.Module) -> int:
    return sum(t.numel() for n, t in routed.state_dict().items() if ".experts." in n)


class Pooling(nn.Module):
    """A learned query that reads its tokens, as at the end of an image tower."""

    def __init__(self) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, 16))
        self.self_attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(x, x, x)[0]
        return self.attention(self.probe.expand(len(x), -1, -1), x, x)[0]


def test_costs_leave_out_what_building_leaves_out():
    from eutectic.routed.routed_layers import routed_layers
    from eutectic.statistics import collect

    torch.manual_seed(0)
    x, y = torch.randn(8, 5, 16), torch.randn(8, 7, 16)
    for model, batch in ((TorchDecoder().eval(), [x, y]), (Pooling().eval(), [x])):
        expert = copy.deepcopy(model)
        for p in expert.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
        statistics = {"a": collect(expert, [batch])}
        routed = build_routed(model, {"a": expert.state_dict()}, statistics, rank=4)
        costs = routed_costs(model, 1, rank=4, statistics=statistics)
        assert len(routed.routing.left_out) == 2 and costs.parameters == added(routed)
        assert routed_layers(model, None, statistics)[1] == routed.routing.left_out
        # Without statistics, torch's own decoder layers are known; elsewhere nothing tells.
        guess = routed_costs(model, 1, rank=4)
        assert (guess == costs) == isinstance(model, TorchDecoder)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_routed_attention_keeps_torch_semantics(batch_first: bool, need_weights: bool):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    holder = nn.ModuleDict({"attn": plain})
    g = torch.randn(20, 8)
    stats = {
        "a": {"attn.in_proj_weight": LayerStatistics(gram=g.T @ g, count=20, input_sum=g.sum(0))}
    }
    weights = {"a": holder.state_dict()}
    routed = build_routed(holder, weights, stats, layers=["attn.in_proj_weight"], rank=2)["attn"]
    shape = (3, 5, 8) if batch_first else (5, 3, 8)
    q, k = torch.randn(shape), torch.randn((3, 7, 8) if batch_first else (7, 3, 8))
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    per_head = torch.randn(6, 5, 7)
    additive = torch.zeros(3, 7).masked_fill(padding, float("-inf"))
    cases = [
        ((q, q, q), {}),
        ((q, q, q), {"attn_mask": causal}),
        ((q, k, k), {"key_padding_mask": padding}),
        ((q, k, k), {"key_padding_mask": additive, "attn_mask": per_head}),
        ((q, k, k), {"average_attn_weights": False}),
        ((q[0], q[0], q[0]), {}),
    ]
    for inputs, options in cases:
        with torch.no_grad():
            y, w = routed(*inputs, need_weights=need_weights, **options)
            expected_y, expected_w = plain(*inputs, need_weights=need_weights, **options)
        torch.testing.assert_close(y, expected_y, atol=1e-5, rtol=1e-4)
        if need_weights:
            torch.testing.assert_close(w, expected_w, atol=1e-5, rtol=1e-4)


def test_modes_that_cannot_be_set(world: World):
    routed = build(world)
    for options, message in (
        ({"mode": "oracle"}, "oracle mode needs expert="),
        ({"mode": "oracle", "expert": "aa"}, "unknown expert 'aa'. Did you mean 'a'"),
        ({"mode": "rout"}, "unknown mode 'rout'. Did you mean 'route'"),
        ({"mode": "soft", "temperature": 0.0}, "temperature"),
        ({"expert": "a"}, "belongs to oracle mode"),
        ({"mode": "vote", "layer": "nothing"}, "no routed layer"),
        ({"mode": "route", "temperature": 0.5}, "temperature= belongs to soft mode"),
        ({"layer": "encoder.layer.0.intermediate.dense.weight"}, "layer= belongs to vote mode"),
    ):
        with pytest.raises(RequestError, match=message.replace("?", "[?]").replace(".", "[.]")):
            with routing(routed, **options):  # type: ignore[arg-type]
                pass
    with pytest.raises(RequestError, match="not a routed model"):
        with routing(world.merged):
            pass


def test_a_layer_that_mixes_samples_is_refused(world: World):
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1 = nn.Linear(4, 4)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.fc1(torch.randn(7, 4))

    g = torch.randn(20, 4)
    stats = {"a": {"fc1.weight": LayerStatistics(gram=g.T @ g, count=20, input_sum=g.sum(0))}}
    model = Mixing()
    routed = build_routed(model, {"a": model.state_dict()}, stats)
    with pytest.raises(RequestError, match="do not divide into 2 samples"):
        routed(torch.zeros(2, 3))


def test_parameters_that_transformers_renames_are_found(tmp_path: Path):
    from safetensors.torch import load_file
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=24, image_size=8, patch_size=4)
    merged, *models = [ViTModel(config).eval() for _ in range(3)]
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(tmp_path / name)
    images = torch.randn(5, 3, 8, 8)
    statistics = {
        n: eutectic.collect(m, [{"pixel_values": images}])
        for n, m in zip("ab", models, strict=True)
    }

    def output(experts) -> torch.Tensor:
        routed = build_routed(merged, experts, statistics, rank=4, router="prototype")
        with routing(routed, mode="oracle", expert="b"):
            return routed(images).last_hidden_state

    expected = output({n: m.state_dict() for n, m in zip("ab", models, strict=True)})
    torch.testing.assert_close(output({n: tmp_path / n for n in "ab"}), expected)
    stored = {n: load_file(tmp_path / n / "model.safetensors") for n in "ab"}
    torch.testing.assert_close(output(stored), expected)
    assert not torch.allclose(expected, merged(images).last_hidden_state, atol=1e-2)


class Shared(nn.Module):
    """One linear layer at two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.inner = nn.Module()
        self.inner.v_proj = self.q_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.v_proj(torch.tanh(self.q_proj(x)))


def test_a_shared_layer_is_routed_at_every_path():
    torch.manual_seed(0)
    model = Shared()
    experts, data = {}, {name: torch.randn(40, 6) for name in "ab"}
    for name in "ab":
        experts[name] = copy.deepcopy(model)
        with torch.no_grad():
            experts[name].q_proj.weight.add_(0.3 * torch.randn(6, 6))
    statistics = {name: eutectic.collect(experts[name], [data[name]]) for name in "ab"}
    states = {name: expert.state_dict() for name, expert in experts.items()}
    routed = eutectic.build_routed(model, states, statistics, rank=6, layers=["*"])
    with torch.no_grad(), eutectic.routing(routed, mode="oracle", expert="a"):
        torch.testing.assert_close(routed(data["a"]), experts["a"](data["a"]), atol=1e-5, rtol=1e-4)


class Positioned(nn.Module):
    """A layer that sees a table of positions besides the samples, as DeBERTa's keys do."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(6, 6)
        self.register_buffer("table", torch.ones(1, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.k_proj(x) + self.k_proj(self.table).mean(1)


def test_tables_of_positions_are_no_samples():
    torch.manual_seed(0)
    model, x = Positioned(), torch.randn(2, 3, 6)
    expert = copy.deepcopy(model)
    with torch.no_grad():
        expert.k_proj.weight.add_(torch.randn(6, 6))
    statistics = {"a": eutectic.collect(nn.Sequential(expert.k_proj), [torch.randn(9, 6)])}
    statistics = {"a": {"k_proj.weight": statistics["a"]["0.weight"]}}
    routed = eutectic.build_routed(
        model, {"a": expert.state_dict()}, statistics, rank=2, layers=["*"]
    )
    with (
        torch.no_grad(),
        eutectic.routing(routed, mode="oracle", expert="a"),
        pytest.raises(RequestError, match=r"\[1, 8, 6\], which do not divide into 2 samples"),
    ):
        routed(x)
