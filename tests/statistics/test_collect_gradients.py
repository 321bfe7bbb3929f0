"""Guards gradient statistics: K-FAC factors and Fisher against autograd on single examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import (
    MODELS,
    Example,
    assert_near,
    assert_same,
    batched,
    bert,
    examples,
    gpt2,
    llama,
    naive,
    padded,
    seeded,
    t5,
)
from torch import Tensor, nn

from eutectic.errors import NumericalError, RequestError
from eutectic.models.linear_head import Head
from eutectic.statistics import collect


def naive_fisher(model: nn.Module, data: list[Example]) -> dict[str, list[Tensor]]:
    """Return, per parameter, the gradients of the loss of each example, in float64."""
    gradients: dict[str, list[Tensor]] = {}
    for example in data:
        model.zero_grad()
        model(**example).loss.backward()
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.setdefault(name, []).append(gradient.double().clone())
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("name", ["bert", "t5", "bart", "gpt2", "llama"])
def test_output_gradient_grams_equal_those_of_single_examples(name: str) -> None:
    # The last example of one token has no target to predict.
    data = [e for e in examples(name) if e["input_ids"].shape[1] > 1]
    model = MODELS[name]()
    expected = naive(model, data)
    found = collect(model, batched(data, 4), output_gradients=True)
    for layer, sums in expected.items():
        assert found[layer].count == sums["count"]
        assert_near(found[layer].output_gradient_gram, sums["output_gradient_gram"], 1e-5)
        assert_near(found[layer].dense_gram(), sums["gram"])


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2", "llama"])
def test_fisher_squares_the_gradient_of_each_example(name: str) -> None:
    data = [e for e in examples(name) if e["input_ids"].shape[1] > 1]
    model = MODELS[name]()
    expected = naive_fisher(model, data)
    found = collect(model, batched(data, 3), fisher=True, block_fisher=True, output_gradients=True)
    for name, gradients in expected.items():
        stack = torch.stack(gradients)
        if stack.norm() < 1e-6:
            continue
        assert_near(found[name].fisher_diagonal, stack.square().sum(0), 1e-5)
        block = found[name].block_fisher
        assert (block is not None) == (stack.ndim == 2)
        if block is not None:
            assert_near(block, stack.T @ stack, 1e-5)
        if found.provenance["layers"][name]["kind"] == "parameter":
            assert found[name].sample_count == len(data)
    linear = naive(model, data)
    layer = next(iter(linear))
    assert_near(found[layer].output_gradient_gram, linear[layer]["output_gradient_gram"], 1e-5)


def test_the_squared_sum_is_not_the_sum_of_squares() -> None:
    """Two examples with opposite gradients have Fisher information, and no mean gradient."""
    model = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(model.weight)
    objective = lambda outputs, batch: outputs.log_softmax(-1)[:, 0]  # noqa: E731
    layer = collect(model, [torch.tensor([[1.0], [-1.0]])], fisher=True, objective=objective)[
        "weight"
    ]
    assert torch.allclose(layer.fisher_diagonal, torch.full((2, 1), 0.5))


def test_frozen_parameters_get_statistics_and_stay_frozen() -> None:
    model, batches = bert(), batched(examples("bert"), 3)
    expected = collect(model, batches, output_gradients=True, fisher=True)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    model.train()
    found = collect(model, batches, output_gradients=True, fisher=True)
    assert_same(expected, found, 0)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "classifier.weight",
        "classifier.bias",
    ]
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())


class InPlace(nn.Module):
    """A layer whose output is overwritten at once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).mul_(3).relu_()


def test_gradients_are_those_of_the_output_before_it_is_overwritten() -> None:
    torch.manual_seed(0)
    model, x = InPlace(), torch.randn(5, 3)
    objective = lambda outputs, batch: outputs.square().sum(1)  # noqa: E731
    found = collect(model, [x], output_gradients=True, objective=objective)["linear.weight"]
    y = model.linear(x).detach().requires_grad_()
    (3 * y).relu().square().sum().backward()
    assert y.grad is not None
    assert_near(found.output_gradient_gram, y.grad.T.double() @ y.grad.double())


def test_a_layer_without_influence_has_a_zero_gram() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.idle(x)
            return self.used(x)

    objective = lambda outputs, batch: outputs.sum(1)  # noqa: E731
    found = collect(Idle(), [torch.ones(4, 3)], output_gradients=True, objective=objective)
    assert torch.equal(found["idle.weight"].output_gradient_gram, torch.zeros(2, 2))
    assert found["idle.weight"].count == 4
    assert found["used.weight"].output_gradient_gram.norm() > 0


def test_wide_outputs_and_long_vectors_are_left_out_and_listed() -> None:
    model, batches = gpt2(), batched(examples("gpt2"), 3)
    found = collect(
        model,
        batches,
        output_gradients=True,
        block_fisher=True,
        output_gradient_limit=39,
        block_limit=20,
    )
    assert found["lm_head.weight"].output_gradient_gram is None
    assert found["lm_head.weight"].dense_gram() is not None
    skipped = found.provenance["skipped"]
    assert "40 > 39 outputs" in skipped["lm_head.weight"]
    assert "48 > 20 entries" in skipped["transformer.h.0.attn.c_attn.bias"]
    assert "64 > 39 outputs" in skipped["transformer.h.0.mlp.c_fc.weight"]


def test_conv1d_grams_are_those_of_the_linear_map() -> None:
    found = collect(gpt2(), batched(examples("gpt2"), 3), output_gradients=True, fisher=True)
    layer = found["transformer.h.0.attn.c_attn.weight"]
    assert found.provenance["layers"]["transformer.h.0.attn.c_attn.weight"]["shape"] == [48, 16]
    assert layer.dense_gram().shape == (16, 16)
    assert layer.output_gradient_gram.shape == (48, 48)
    assert layer.fisher_diagonal.shape == (16, 48)


@pytest.mark.parametrize("make", [bert, gpt2, t5, llama])
def test_sampled_labels_depend_on_seed_and_example_only(make: Any) -> None:
    model, data = make(), examples(make.__name__)
    if make is not t5:
        for example in data:
            del example["labels"]

    def run(seed: int, size: int, some: list[Example] = data):  # noqa: ANN202
        return collect(
            model, batched(some, size), output_gradients=True, labels="sample", seed=seed
        )

    first = run(0, 2)
    assert_same(first, run(0, 5), 1e-5)
    assert_same(first, run(0, 3, data[::-1]), 1e-5)
    other = run(1, 2)
    layer = next(n for n in first if first[n].output_gradient_gram.norm() > 0)
    difference = first[layer].output_gradient_gram - other[layer].output_gradient_gram
    assert difference.norm() > 1e-3 * first[layer].output_gradient_gram.norm()
    assert first.provenance["settings"]["labels"] == "sample"


def test_the_true_fisher_is_the_mean_over_sampled_labels() -> None:
    torch.manual_seed(0)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.linear(x)}

    model, point = Head(), torch.randn(1, 2)
    # Nearly equal examples, so that each has a draw of its own.
    x = point + 1e-6 * torch.randn(4000, 2)
    found = collect(model, [{"x": x}], output_gradients=True, labels="sample", max_examples=4000)
    p = model.linear(point).softmax(-1)[0].detach().double()
    expected = torch.diag(p) - torch.outer(p, p)
    actual = found["linear.weight"].output_gradient_gram.double() / 4000
    assert (actual - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("regression", torch.tensor([[0.5], [-1.0]])),
        ("multi_label_classification", torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
    ],
)
def test_other_objectives(problem: str, labels: Tensor) -> None:
    model = bert(problem_type=problem)
    if problem == "regression":
        model.classifier, model.num_labels = nn.Linear(16, 1), 1
    batch = padded(examples("bert")[:2]) | {"labels": labels}
    found = collect(model, [batch], output_gradients=True)["classifier.weight"]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.detach()
    wanted = labels - (logits if problem == "regression" else logits.sigmoid())
    assert_near(found.output_gradient_gram, (wanted.T @ wanted).double(), 1e-5)
    sampled = collect(model, [batch], output_gradients=True, labels="sample")
    assert sampled["classifier.weight"].output_gradient_gram is not None


def test_token_classification_leaves_out_padding() -> None:
    model = seeded("BertForTokenClassification", num_labels=3)
    data = examples("bert")
    for example in data:
        example["labels"] = example["input_ids"] % 3
    expected = naive(model, data)
    found = collect(model, batched(data, 3), output_gradients=True)
    sums = expected["classifier.weight"]["output_gradient_gram"]
    assert_near(found["classifier.weight"].output_gradient_gram, sums, 1e-5)


def test_gradients_use_a_thousand_examples_unless_told_otherwise() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"logits": self.linear(x)}

    batch = {"x": torch.randn(1200, 2), "labels": torch.zeros(1200).long()}
    assert collect(Head(), [batch], output_gradients=True)["linear.weight"].count == 1000
    assert collect(Head(), [batch])["linear.weight"].count == 1200


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor, label: Tensor) -> dict[str, Tensor]:
        return {"logits": self.linear(x)}


def test_requests_without_labels_or_logits() -> None:
    model = bert()
    batch = padded(examples("bert"))
    labels = batch.pop("labels")
    with pytest.raises(RequestError, match="labels='sample'"):
        collect(model, [batch], output_gradients=True)
    with pytest.raises(RequestError, match="no logits"):
        collect(model.bert, [batch], output_gradients=True)
    with pytest.raises(RequestError, match="one row per example"):
        collect(
            model, [batch | {"label": labels[:2]}], output_gradients=True, objective=None or "auto"
        )
    with pytest.raises(RequestError, match="one log-likelihood per example"):
        collect(model, [batch], output_gradients=True, objective=lambda o, b: o.logits.sum())
    with pytest.raises(RequestError, match="cannot be drawn"):
        collect(
            model,
            [batch],
            output_gradients=True,
            labels="sample",
            objective=lambda o, b: o.logits.sum(1),
        )


@pytest.mark.parametrize(
    "given",
    [{"labels": "sample"}, {"objective": "regression"}, {"head": Head(*2 * [torch.ones(1)])}],
)
def test_what_only_gradients_need_is_refused_without(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="is for gradients; ask for output_gradients"):
        collect(bert(), [padded(examples("bert"))], **given)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model, batch = bert(), padded(examples("bert"))
    with torch.no_grad():
        model.classifier.bias.fill_(float("inf"))
    with pytest.raises(NumericalError, match="log-likelihood of batch 0"):
        collect(model, [batch], output_gradients=True)


class Passed(nn.Module):
    """One layer twice for every example, one for some examples only, one for none."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.some, self.never = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twice(self.twice(x))
        return self.some(hidden) if bool((x[:, 0] > 0).any()) else hidden


def test_a_fisher_is_divided_by_examples_however_often_each_reaches_the_layer() -> None:
    import eutectic

    base, x = Passed(), torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    x[:3, 0], x[3:, 0] = 1.0, -1.0  # every example of `b`, a third of those of `a`
    experts, statistics, means = {}, {}, {}
    for seed, (name, count) in enumerate({"a": 9, "b": 3}.items()):
        torch.manual_seed(seed + 1)
        model = Passed()
        experts[name] = model.state_dict()
        statistics[name] = collect(
            model,
            [row.unsqueeze(0) for row in x[:count]],
            fisher=True,
            objective=lambda outputs, batch: -outputs.square().sum(1),
        )
        squares = {n: torch.zeros_like(p).double() for n, p in model.named_parameters()}
        for row in x[:count]:
            model.zero_grad()
            model(row.unsqueeze(0)).square().sum().backward()
            for n, p in model.named_parameters():
                squares[n] += 0 if p.grad is None else p.grad.double().square()
        means[name] = {n: (total / count).clamp_min(1e-8) for n, total in squares.items()}
    assert statistics["a"]["twice.weight"].sample_count == 18
    assert [s["some.weight"].sample_count for s in statistics.values()] == [3, 3]
    assert [s["some.weight"].examples for s in statistics.values()] == [9, 3]
    merged = eutectic.merge_state_dicts(
        base.state_dict(), experts, method="fisher", statistics=statistics, scale=1.0
    )
    for name, value in merged.items():
        total = sum(means[n][name] for n in experts)
        wanted = sum(means[n][name] * experts[n][name] for n in experts) / total
        torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=1e-5, msg=name)
