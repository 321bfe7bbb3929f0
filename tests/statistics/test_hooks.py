"""Guards hooks: attention projections are seen, the model computes the same, nothing is left."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import assert_near, batched, bert, examples
from torch import Tensor, nn

from eutectic.statistics import collect


def left_behind(model: nn.Module) -> list[str]:
    found = [n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    found += [n for n, m in model.named_modules() if "forward" in m.__dict__]
    return found + ([] if torch.backends.mha.get_fastpath_enabled() else ["fast path off"])


class Failing(nn.Module):
    """Fails on the third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.linear = nn.Linear(4, 4).requires_grad_(False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise KeyError("broken data")
        return self.linear(self.attention(x, x, x)[0])


def test_nothing_is_left_after_an_exception() -> None:
    model = Failing().train()
    with pytest.raises(KeyError, match="broken data"):
        collect(
            model,
            [torch.randn(2, 3, 4)] * 4,
            output_gradients=True,
            objective=lambda outputs, batch: outputs.sum((1, 2)),
        )
    assert left_behind(model) == []
    assert model.training and model.attention.training
    assert not model.linear.weight.requires_grad


def test_nothing_is_left_after_success_and_the_model_is_unchanged() -> None:
    model = bert()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    collect(model, batched(examples("bert"), 3), output_gradients=True, block_fisher=True)
    assert left_behind(model) == []
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def attention(**arguments: object) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **arguments).eval()  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


class Calling(nn.Module):
    """Calls an attention module in a given way."""

    def __init__(self, module: nn.MultiheadAttention, **arguments: object) -> None:
        super().__init__()
        self.attn, self.arguments, self.seen = module, arguments, []

    def forward(self, *inputs: Tensor) -> Tensor:
        query, key, value = inputs if len(inputs) == 3 else inputs * 3
        if not self.attn.batch_first:
            query = key = value = query.transpose(0, 1)
        output, weights = self.attn(query, key, value, **self.arguments)
        output = output if self.attn.batch_first else output.transpose(0, 1)
        self.seen.append((output, weights))
        return output


def by_hand(module: nn.MultiheadAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the packed projections `[…, 24]` and the heads' concatenated outputs `[…, 8]`."""
    packed = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in packed.chunk(3, -1))
    heads = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    return packed, heads.transpose(1, 2).flatten(-2)


def test_self_attention_has_one_gram_for_the_packed_projection() -> None:
    module, x = attention(batch_first=True), torch.randn(3, 5, 8)
    model = Calling(module)
    keep = x[..., 0] > 0
    found = collect(
        model,
        [x],
        output_gradients=True,
        fisher=True,
        token_mask=lambda batch: batch[..., 0] > 0,
        objective=lambda outputs, batch: outputs.square().sum((1, 2)),
    )
    assert {n for n in found if "bias" not in n} == {"attn.in_proj_weight", "attn.out_proj.weight"}
    packed, heads = by_hand(module, x)
    out = nn.functional.linear(heads, module.out_proj.weight, module.out_proj.bias)
    packed_gradient, out_gradient = torch.autograd.grad(out.square().sum(), [packed, out])
    for name, inputs, gradient in (
        ("attn.in_proj_weight", x, packed_gradient),
        ("attn.out_proj.weight", heads.detach(), out_gradient),
    ):
        a, y = inputs[keep].double(), gradient[keep].double()
        assert found[name].count == int(keep.sum())
        assert_near(found[name].dense_gram(), a.T @ a)
        assert_near(found[name].output_gradient_gram, y.T @ y, 1e-5)
    assert found["attn.in_proj_weight"].fisher_diagonal.shape == (24, 8)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"batch_first": True}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}],
)
@pytest.mark.parametrize("call", [{}, {"need_weights": False}, {"average_attn_weights": False}])
def test_the_attention_computes_the_same_under_observation(arguments: dict, call: dict) -> None:
    mask = torch.zeros(4, 4).bool()
    mask[0, 1] = True
    model = Calling(attention(**arguments), attn_mask=mask, **call)
    x = torch.randn(4, 4, 8)
    with torch.no_grad():
        model(x)
        collect(model, [x])
    (expected, expected_weights), _, (output, weights) = model.seen
    assert torch.allclose(output, expected, atol=1e-6)
    assert (weights is None) == (expected_weights is None)
    assert weights is None or torch.allclose(weights, expected_weights, atol=1e-6)


def test_cross_attention_has_parts_and_separate_weights_their_own_names() -> None:
    query, memory = torch.randn(2, 3, 8), torch.randn(2, 6, 8)
    model = Calling(attention(batch_first=True))
    found = collect(model, [(query, memory, memory)])
    assert set(found) == {
        *(f"attn.in_proj_weight[{part}]" for part in "qkv"),
        "attn.out_proj.weight",
    }
    rows = memory.reshape(-1, 8).double()
    assert_near(found["attn.in_proj_weight[k]"].dense_gram(), rows.T @ rows)
    assert found.provenance["layers"]["attn.in_proj_weight[v]"]["inputs"].endswith("[k]")
    assert found["attn.in_proj_weight[q]"].count == 6

    wide = torch.randn(2, 6, 5)
    model = Calling(attention(batch_first=True, kdim=5, vdim=5))
    with torch.no_grad():
        expected = model(query, wide, wide)
        found = collect(model, [(query, wide, wide)])
    assert torch.allclose(model.seen[-1][0], expected, atol=1e-6)
    rows = wide.reshape(-1, 5).double()
    assert_near(found["attn.v_proj_weight"].dense_gram(), rows.T @ rows)
    assert found["attn.q_proj_weight"].dense_gram().shape == (8, 8)


def test_a_transformer_encoder_is_seen_although_it_has_a_fused_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(3, 5, 8)
    found = collect(model, [x])
    assert len(found) == 8
    assert found.provenance["unseen"] == []
    rows = x.reshape(-1, 8).double()
    assert_near(found["layers.0.self_attn.in_proj_weight"].dense_gram(), rows.T @ rows)


def test_sequence_first_attention_pools_per_sample() -> None:
    model = Calling(attention())
    x = torch.randn(4, 4, 8)  # as many tokens as samples: only the module's layout tells
    found = collect(model, [x])
    means = x.mean(1).double()
    assert_near(found["attn.in_proj_weight"].pooled_gram, means.T @ means)


def test_two_modules_with_one_weight_add_up() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    x = torch.randn(5, 3)
    found = collect(nn.Sequential(first, nn.Tanh(), second), [x])
    a = x.double()
    b = torch.tanh(first(x)).detach().double()
    assert_near(found["0.weight"].dense_gram(), a.T @ a + b.T @ b)
    assert found["2.weight"].count == found["0.weight"].count == 10
    assert found.provenance["layers"]["2.weight"]["same_as"] == "0.weight"
