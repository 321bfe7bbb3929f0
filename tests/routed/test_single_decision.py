"""Guards routers that decide once: their rules, one decision for all layers, files and exports."""

from __future__ import annotations

import json

import pytest
import torch

from eutectic.errors import RequestError, StatisticsError
from eutectic.routed import build_routed, export_lora, load_routed, routing
from eutectic.routed.routed_modules import RoutedLinear
from eutectic.routed.router_quality import estimated_quality, router_quality
from eutectic.routed.single_decision import mad_router, sim_router
from eutectic.types import LayerStatistics

from .world import bert, gpt2, output, summed, t5

pytestmark = pytest.mark.filterwarnings("ignore")


def statistics(data: list[torch.Tensor]) -> list[LayerStatistics]:
    return [summed([row.unsqueeze(0) for row in rows]) for rows in data]


def test_gaussians_with_one_covariance_get_the_decision_of_bayes():
    g = torch.Generator().manual_seed(4)
    width, tasks = 8, 4
    mixing = torch.randn(width, width, generator=g).double()
    covariance = mixing @ mixing.T + 0.1 * torch.eye(width)
    means = [1.2 * torch.randn(width, generator=g).double() for _ in range(tasks)]

    def draw(mean: torch.Tensor, count: int) -> torch.Tensor:
        return torch.randn(count, width, generator=g).double() @ mixing.T + mean

    router = mad_router(statistics([draw(mean, 600) for mean in means]), "layer")
    fresh = torch.cat([draw(mean, 500) for mean in means])
    labels = torch.arange(tasks).repeat_interleave(500)
    known = torch.distributions.MultivariateNormal
    likelihood = torch.stack([known(m, covariance).log_prob(fresh) for m in means], 1)
    ours, bayes = router(fresh.float()).argmax(1), likelihood.argmax(1)
    assert float((ours == bayes).double().mean()) > 0.9
    right = [float((choice == labels).double().mean()) for choice in (ours, bayes)]
    assert right[0] > right[1] - 0.02 and right[1] > 0.5


def test_the_residual_to_each_subspace():
    g = torch.Generator().manual_seed(5)
    bases = [torch.linalg.qr(torch.randn(12, 3, generator=g).double())[0] for _ in range(3)]
    data = [
        torch.randn(60, 3, generator=g).double() @ basis.T + 0.05 * torch.randn(60, 12, generator=g)
        for basis in bases
    ]
    router = sim_router(statistics(data), "layer")
    assert router.weight.shape == (9, 12)  # three directions hold 95 %
    x = torch.randn(7, 12, generator=g)
    expected = []
    for rows in data:
        Vh = torch.linalg.svd(rows, full_matrices=False)[2][:3]
        rest = x.double() - x.double() @ Vh.T @ Vh
        expected.append(1 - (rest.norm(dim=1) / x.double().norm(dim=1)) ** 2)
    torch.testing.assert_close(router(x).double(), torch.stack(expected, 1), atol=1e-5, rtol=0)
    for t, basis in enumerate(bases):
        fresh = torch.randn(40, 3, generator=g).double() @ basis.T
        assert (router(fresh.float()).argmax(1) == t).all()
    assert not router(torch.zeros(1, 12)).any()


def test_a_task_of_fewer_samples_than_directions_has_no_more():
    g = torch.Generator().manual_seed(6)
    few, many = torch.randn(2, 9, generator=g).double(), torch.randn(50, 9, generator=g).double()
    router = sim_router(statistics([few, many]), "layer")
    rows = router.weight.unflatten(0, (2, -1)).square().sum(-1)
    assert int((rows[0] > 0.5).sum()) == 2 and int((rows[1] > 0.5).sum()) > 5
    empty = [LayerStatistics(gram=torch.eye(9), count=3), *statistics([many])]
    with pytest.raises(StatisticsError, match="expert 'a': no pooled sums"):
        sim_router(empty, "layer", ["a", "b"])
    zero = statistics([torch.zeros(5, 9).double(), many])
    with pytest.raises(StatisticsError, match="span nothing"):
        sim_router(zero, "layer")


@pytest.fixture(scope="module")
def encoder():
    return bert()


def built(world, router: str, **options):
    return build_routed(
        world.merged, world.state_dicts(), world.statistics(), world.statistics(of_merged=True),
        rank=4, router=router, **options,
    )  # fmt: skip


@pytest.mark.parametrize("router", ["mad", "sim"])
def test_one_decision_for_all_layers(encoder, router, tmp_path):
    routed = built(encoder, router)
    batch = encoder.mixed()
    with routing(routed, record=True) as decisions:
        found = output(routed, batch)
    chosen = list(decisions.values())
    assert len(chosen) > 4 and all(torch.equal(own, chosen[0]) for own in chosen)
    assert routed.routing.decider == list(decisions)[-1]
    # It is what the decider's router says of the features with the experts off.
    with routing(routed, mode="base", record=True) as alone:
        routed(**batch)
    assert torch.equal(chosen[0], alone[routed.routing.decider])
    names = [routed.routing.experts[t] for t in chosen[0].tolist()]
    with routing(routed, mode="oracle", expert=names):
        torch.testing.assert_close(found, output(routed, batch), atol=1e-5, rtol=1e-5)
    assert float((chosen[0] == torch.tensor(encoder.labels())).double().mean()) > 0.6
    routed.save_pretrained(tmp_path / "routed")
    again = load_routed(tmp_path / "routed", encoder.merged.__class__)
    assert again.routing.decider == routed.routing.decider
    assert torch.equal(output(again, batch), found)
    batches = {n: [encoder.batch(t, 6, 3)] for t, n in enumerate(routed.routing.experts)}
    measured = router_quality(routed, batches)
    assert {tuple(layer.values()) for layer in measured.layers.values()} == {
        tuple(measured.decisions.values())
    }
    guess = estimated_quality(routed, encoder.statistics(of_merged=True))
    assert (guess is None) == (router == "sim")
    if guess is not None:
        assert guess.decisions == guess.layers[routed.routing.decider]


@pytest.mark.parametrize("router", ["mad", "sim"])
def test_soft_weights_and_votes_are_those_of_the_deciding_layer(encoder, router):
    routed, batch = built(encoder, router), {k: v[:1] for k, v in encoder.mixed().items()}
    layers = {m.experts.name: m for m in routed.modules() if isinstance(m, RoutedLinear)}
    seen = []
    deciding = layers[routed.routing.decider].experts.router
    handle = deciding.register_forward_hook(lambda module, args, scores: seen.append(scores))
    with torch.no_grad(), routing(routed, mode="base", record=True):
        routed(**batch)
    handle.remove()
    temperature = float(seen[0].max() - seen[0].min())
    weights = (seen[0][0] / temperature).softmax(-1)
    with torch.no_grad(), routing(routed, mode="soft", temperature=temperature):
        mixed = output(routed, batch)
    with torch.no_grad():
        alone = output(routed, batch)
    with torch.no_grad(), routing(routed, mode="vote", record=True) as voted:
        assert torch.equal(output(routed, batch), alone)
    assert all(int(chosen) == int(seen[0].argmax()) for chosen in voted.values())
    for layer in layers.values():  # the mixture as one dense change, experts off
        experts = layer.experts
        layer.weight.data += torch.einsum("t,tor,tri->oi", weights, experts.up, experts.down)
    with torch.no_grad(), routing(routed, mode="base"):
        torch.testing.assert_close(output(routed, batch), mixed, atol=1e-5, rtol=1e-5)


def test_another_layer_decides_where_it_is_named(encoder):
    first = built(encoder, "mad").routing
    name = "encoder.layer.0.attention.self.key.weight"
    routed = built(encoder, "mad", decider=name)
    assert routed.routing.decider == name != first.decider


def test_generation_keeps_the_decision_on_the_prompt():
    world = gpt2()
    routed = built(world, "mad")
    prompt = world.batch(1, 2, 7)
    with routing(routed, record=True) as decisions:
        routed.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert all(len(own) == 2 for own in decisions.values())
    assert len({tuple(own.tolist()) for own in decisions.values()}) == 1


def test_exports(encoder, tmp_path):
    pytest.importorskip("peft")
    routed = built(encoder, "mad")
    export_lora(routed, tmp_path / "adapters")
    told = json.loads((tmp_path / "adapters" / "router.json").read_text())
    path = routed.routing.decider.removesuffix(".weight")
    assert told["layers"] == [path] and told["router"] == "mad" and not told["accumulate"]
    with pytest.raises(RequestError, match="no words"):
        export_lora(built(encoder, "sim"), tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "mad", "accumulate": True}, "decides once"),
        ({"router": "sim", "shrinkage": 0.1}, "shrinkage belongs"),
        ({"router": "mad", "decider": "encoder.layer.0"}, "no routed layer"),
        ({"router": "discriminant", "decider": "x"}, "decider belongs"),
        ({"router": "nearest"}, "known: discriminant, prototype, mad, sim"),
    ],
)
def test_refusals(encoder, options, message):
    with pytest.raises(RequestError, match=message):
        built(encoder, **options)


def test_the_encoder_decides_for_its_decoder():
    """Generation runs the encoder alone: what the decoder would say comes too late."""
    world = t5()
    routed = built(world, "mad")
    decider = "encoder.block.1.layer.1.DenseReluDense.wi.weight"
    assert routed.routing.decider == decider
    batch = world.mixed()
    with routing(routed, record=True) as whole:
        routed(**batch)
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with routing(routed, record=True) as generated:
        routed.generate(**source, max_new_tokens=3, do_sample=False)
    with routing(routed, mode="base", record=True) as alone:
        routed(**batch)
    wanted = tuple(alone[decider].tolist())
    for decisions in (whole, generated):
        assert {tuple(own.tolist()) for own in decisions.values()} == {wanted}
    with pytest.raises(RequestError, match="of the decoder"):
        built(world, "mad", decider="decoder.block.0.layer.0.SelfAttention.q.weight")
