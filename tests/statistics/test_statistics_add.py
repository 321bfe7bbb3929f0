"""Guards addition: sums over disjoint data equal one collection over all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import assert_near, assert_same, batched, bert, examples
from torch import nn

from eutectic.errors import RequestError, StatisticsError
from eutectic.statistics import add_statistics, collect

DATA = examples("bert", (7, 4, 1, 5, 2, 6, 3, 4))


def test_adding_equals_collecting_over_the_union(tmp_path: Path) -> None:
    arguments = {"output_gradients": True, "fisher": True, "block_fisher": True}
    model = bert()
    parts = [
        collect(model, batched(some, 2), tmp_path / f"{i}.safetensors", **arguments)
        for i, some in enumerate((DATA[:2], DATA[2:3], DATA[3:]))
    ]
    whole = collect(model, batched(DATA, 4), **arguments)
    paths = [p.path for p in parts if p.path is not None]

    total = add_statistics(paths, tmp_path / "sum.safetensors")

    assert_same(whole, total, 1e-5)
    assert total.provenance == whole.provenance
    assert torch.equal(total.tensors["examples"], whole.tensors["examples"])
    assert {n for n in whole.tensors} == {n for n in total.tensors}
    assert_same(total, add_statistics(paths[::-1]), 1e-6)


def test_factors_stay_factors_while_tokens_are_few() -> None:
    model = bert()
    parts = [collect(model, batched(DATA[i : i + 1], 1)) for i in (1, 2, 4)]
    total = add_statistics(parts)
    layer = total["bert.encoder.layer.1.output.dense.weight"]
    assert layer.gram_factor is not None and layer.gram_factor.shape == (7, 32)
    assert_same(collect(model, batched([DATA[1], DATA[2], DATA[4]], 3)), total, 1e-5)


def test_truncated_files_add_up_to_a_truncated_file() -> None:
    model = bert()
    halves = [collect(model, batched(some, 2), rank=5) for some in (DATA[:4], DATA[4:])]
    total, exact = add_statistics(halves), collect(model, batched(DATA, 4))
    for name in total:
        factor = total[name].gram_factor
        if factor is None:
            continue
        assert len(factor) <= 5
        gram = exact[name].dense_gram()
        assert gram is not None
        assert_near(total[name].dense_gram().diagonal(), gram.diagonal(), 1e-5)
        assert_near(total[name].dense_gram(), gram, 0.3)


def test_layers_shared_in_one_file_only_are_added_apart() -> None:
    model = bert()
    shared = collect(model, batched(DATA[:4], 2))
    apart = collect(model, batched(DATA[4:], 2), share_inputs=False)
    total = add_statistics([shared, apart])
    assert all(layer["inputs"] == name for name, layer in total.provenance["layers"].items())
    assert_same(collect(model, batched(DATA, 4)), total, 1e-5)


def test_layers_without_tokens_stay_unseen() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) if float(x[0, 0]) > 0 else self.b(x)

    model = Half()
    first = collect(model, [torch.ones(1, 2)])
    assert first.provenance["unseen"] == ["b.weight"]
    again = collect(model, [torch.full((1, 2), 2.0)])
    assert add_statistics([first, again]).provenance["unseen"] == ["b.weight"]
    other = collect(model, [-torch.ones(1, 2)])
    total = add_statistics([first, other])
    assert total.provenance["unseen"] == []
    assert total["b.weight"].count == 1


def test_vectors_without_a_gradient_stay_unseen() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.ones(2)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.a if float(x[0, 0]) > 0 else x * self.b

    def run(x: torch.Tensor, **kinds: bool) -> Any:
        return collect(
            Half(), [x], grams=False, objective=lambda outputs, _: outputs.sum(1), **kinds
        )

    for kinds in ({"block_fisher": True}, {"fisher": True}, {"block_fisher": True, "fisher": True}):
        first, again, other = (run(torch.full((1, 2), x), **kinds) for x in (1.0, 2.0, -1.0))
        assert first.provenance["unseen"] == ["b"] and other.provenance["unseen"] == ["a"]
        assert add_statistics([first, again]).provenance["unseen"] == ["b"]
        total = add_statistics([first, other])
        assert total.provenance["unseen"] == []
        assert total["b"].sample_count == 2


def changed(**arguments: Any) -> Any:
    return lambda: collect(bert(), batched(DATA[4:], 2), **arguments)


def another_model() -> Any:
    model = bert()
    with torch.no_grad():
        model.classifier.bias.add_(1)
    return collect(model, batched(DATA[4:], 2))


def another_shape() -> Any:
    model = bert()
    model.classifier, model.num_labels = nn.Linear(16, 5), 5
    return collect(model, batched(DATA[4:], 2), fingerprint=collect(bert(), DATA[:1]).fingerprint)


def without_mask() -> Any:
    batches = batched(DATA[4:], 1)
    for batch in batches:
        del batch["attention_mask"]
    return collect(bert(), batches)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (another_model, "checkpoint: "),
        (another_shape, r"'classifier.weight': \[3, 16\] and \[5, 16\]"),
        (without_mask, "mask_policy: .*attention_mask.*all"),
        (changed(output_gradients=True), "output_gradients: False and True"),
        (changed(rank=3), "rank: None and 3"),
        (changed(layers=["*query*"]), "only one of them has"),
        (lambda: collect(bert(), batched(DATA[3:], 2)), "shares 1 of its 5 examples"),
    ],
)
def test_mixtures_that_make_no_sense(other: Any, message: str) -> None:
    first = collect(bert(), batched(DATA[:4], 2))
    with pytest.raises(StatisticsError, match=message):
        add_statistics([first, other()])


def test_labels_of_different_origin_do_not_mix() -> None:
    kinds = [
        collect(bert(), batched(some, 2), output_gradients=True, labels=labels)
        for some, labels in ((DATA[:4], "data"), (DATA[4:], "sample"))
    ]
    with pytest.raises(StatisticsError, match="labels: data and sample"):
        add_statistics(kinds)


def test_a_sum_that_only_one_file_has_is_refused() -> None:
    """The count would be that of both."""
    kinds = [
        collect(bert(), batched(some, 2), output_gradients=True, output_gradient_limit=limit)
        for some, limit in ((DATA[:4], 100), (DATA[4:], 20))
    ]
    with pytest.raises(StatisticsError, match="only one of them left out '.*': output_gradient"):
        add_statistics(kinds)


def test_objectives_of_one_name_do_not_mix() -> None:
    def power(exponent: int) -> Any:
        return lambda outputs, batch: outputs.logits[:, 0] ** exponent

    once, again, other = (
        collect(bert(), batched(some, 2), block_fisher=True, objective=power(exponent))
        for some, exponent in ((DATA[:4], 1), (DATA[4:], 1), (DATA[4:], 2))
    )
    add_statistics([once, again])
    with pytest.raises(StatisticsError, match="objective: .*power.* and .*power"):
        add_statistics([once, other])


def test_padding_does_not_hide_an_overlap() -> None:
    first = collect(bert(), batched(DATA[:2], 2))
    with pytest.raises(StatisticsError, match="shares 1 of its 2"):
        add_statistics([first, collect(bert(), batched(DATA[1:3], 1))])


def test_nothing_to_add() -> None:
    with pytest.raises(RequestError, match="no statistics files"):
        add_statistics([])
