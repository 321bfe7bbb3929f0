"""Guards the in-memory entry: what it takes, what it returns, what it refuses in which words."""

from __future__ import annotations

import pytest
import torch

import eutectic
from eutectic.errors import MethodError, NumericalError
from eutectic.methods import merge_matrices, methods
from eutectic.types import LayerStatistics, Merged

DELTAS = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))


def test_a_sequence_is_a_stack():
    merged = merge_matrices("average", list(DELTAS))
    assert torch.equal(merged, merge_matrices("average", DELTAS))


def test_full_output_holds_the_record():
    merged = merge_matrices("average", DELTAS, full_output=True)
    assert isinstance(merged, Merged)
    assert merged.record == {}
    assert torch.allclose(merged.delta, DELTAS.mean(0))


def test_one_expert():
    assert torch.equal(merge_matrices("average", DELTAS[:1]), DELTAS[0])


@pytest.mark.parametrize("shape", [(3, 0, 5), (3, 4, 0)])
@pytest.mark.parametrize("method", ["average", "ties", "dare_linear"])
def test_empty_tensors(method, shape):
    assert merge_matrices(method, torch.zeros(shape)).shape == shape[1:]


@pytest.mark.parametrize(
    ("deltas", "more", "words"),
    [
        ([], {}, "no delta at all"),
        ([torch.ones(2, 2), torch.ones(3, 2)], {}, r"one shape, got \[\(2, 2\), \(3, 2\)\]"),
        (torch.ones(2), {}, r"takes deltas \[T, \.\.\.\], got shape \[2\]"),
        (torch.ones(2, 2, 2).int(), {}, "must be floating-point, got torch.int32"),
        (DELTAS, {"weights": [1, 2]}, r"weights must be 3 finite numbers, got \[1, 2\]"),
        (DELTAS, {"weights": [1, 2, float("nan")]}, "weights must be 3 finite numbers"),
        (DELTAS, {"weights": [1, 2, float("inf")]}, "weights must be 3 finite numbers"),
        (DELTAS, {"experts": ["a", "a", "b"]}, "experts must be 3 different names"),
        (DELTAS, {"base": torch.ones(5, 4)}, r"base must have the shape of one delta \[4, 5\]"),
        (DELTAS, {"initial": torch.ones(4)}, r"initial must have the shape .* got \[4\]"),
        (DELTAS, {"statistics": [None]}, r"one entry per expert \(3\), got 1"),
        (DELTAS, {"density": 0.5}, "unknown parameter 'density'"),
    ],
)
def test_refusals(deltas, more, words):
    with pytest.raises(MethodError, match=words):
        merge_matrices("average", deltas, **more)


def test_a_misspelt_keyword_of_the_call_gets_a_suggestion():
    with pytest.raises(MethodError, match="unknown parameter 'expert'. Did you mean 'experts'"):
        merge_matrices("average", DELTAS, expert=["a", "b", "c"])


def test_matrix_methods_take_matrices():
    with pytest.raises(
        MethodError, match=r"'iso_c' takes deltas \[T, out, in\], got shape \[2, 3\]"
    ):
        merge_matrices("iso_c", torch.ones(2, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_traced_to_the_expert(value):
    deltas = DELTAS.clone()
    deltas[1, 2, 3] = value
    with pytest.raises(NumericalError, match=r"deltas of expert \[1\]; nothing was merged"):
        merge_matrices("average", deltas)


def test_what_a_method_lacks_is_named():
    with pytest.raises(MethodError, match="'esm' needs statistics with 'gram' for every expert"):
        merge_matrices("esm", DELTAS, statistics=[LayerStatistics(gram=torch.eye(5)), None, None])


def test_a_factor_serves_as_a_gram():
    assert LayerStatistics(gram_factor=torch.ones(2, 5)).has("gram")
    assert not LayerStatistics(input_sum=torch.ones(5)).has("gram")


def test_the_table_of_methods():
    table = methods()
    assert table == eutectic.methods()
    assert set(table["dare_ties"]["parameters"]) == {"density", "rescale", "aggregate", "consensus"}
    assert table["ties"]["parameters"]["density"]["default"] == 0.2
    assert table["esm"]["needs"] == ["gram"]
    assert table["slerp"]["experts"] == (2, 2)
    assert table["iso_c"]["default_scale"] == 1.3


@pytest.mark.parametrize(
    "name",
    ["average", "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"]
    + ["iso_c", "iso_cts", "tsv_m"],
)
def test_promised_methods_are_there(name):
    assert name in methods()
