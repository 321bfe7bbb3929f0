"""Guards the contract's machinery: registration, parameters in words, contexts and seeds."""

from __future__ import annotations

import dataclasses
from dataclasses import FrozenInstanceError, dataclass
from typing import Annotated, Literal

import pytest
import torch
from annotated_types import Ge, Le

from eutectic.errors import MethodError
from eutectic.methods import all_methods, get_method, register
from eutectic.methods import registry as registry_module
from eutectic.methods.registry import Context, Parameters, Takes


@dataclass(frozen=True, kw_only=True)
class SampleParameters(Parameters):
    """Parameters of a method for these tests."""

    density: Annotated[float, Ge(0), Le(1)] = 0.2
    mode: Literal["mean", "sum"] = "mean"
    count: int = 1


@pytest.fixture
def table(monkeypatch):
    """A copy of the table, thrown away after the test."""
    monkeypatch.setattr(registry_module, "_METHODS", dict(registry_module._METHODS))


@pytest.fixture
def sample(table):
    register("sample", summary="A sample.", parameters=SampleParameters)(
        lambda deltas, parameters, context: deltas.sum(0)
    )
    return get_method("sample")


def test_the_table_is_sorted_and_a_copy():
    methods = all_methods()
    assert list(methods) == sorted(methods)
    methods.clear()
    assert "average" in all_methods()


def test_a_name_is_registered_once(table):
    with pytest.raises(ValueError, match="'average' is registered twice"):
        register("average", summary="")(lambda d, p, c: d[0])


def test_laws_that_nobody_checks_cannot_be_claimed(table):
    with pytest.raises(ValueError, match=r"'fresh' claims laws that nobody checks: \['gravity'\]"):
        register("fresh", summary="", laws={"zero", "gravity"})(lambda d, p, c: d[0])
    assert "fresh" not in all_methods()


def test_registering_leaves_the_function_alone(table):
    def function(deltas, parameters, context):
        return deltas[0]

    assert register("fresh", summary="")(function) is function


@pytest.mark.parametrize(
    ("wrong", "hint"), [("task_arithmetik", "'task_arithmetic'"), ("iso-c", "'iso_c'")]
)
def test_unknown_methods_get_a_suggestion(wrong, hint):
    with pytest.raises(MethodError, match=f"Did you mean {hint}") as caught:
        get_method(wrong)
    assert "Known methods: arcee_fusion, average," in str(caught.value)


def test_unlike_anything_gets_no_suggestion():
    with pytest.raises(MethodError) as caught:
        get_method("zzz")
    assert "Did you mean" not in str(caught.value)


def test_parameters_are_frozen_and_typed(sample):
    values = sample.parse({"density": 1, "mode": "sum"})
    assert values == SampleParameters(density=1.0, mode="sum")
    with pytest.raises(FrozenInstanceError):
        values.density = 0.5


def test_every_fault_of_the_parameters_is_told(sample):
    with pytest.raises(MethodError) as caught:
        sample.parse({"densty": 0.1, "density": 2, "mode": "max", "count": "many"})
    text = str(caught.value)
    assert "unknown parameter 'densty'. Did you mean 'density'? Allowed: density, mode" in text
    assert "density: input should be less than or equal to 1, got 2." in text
    assert "mode: input should be 'mean' or 'sum', got 'max'." in text
    assert "count:" in text and "got 'many'" in text
    assert len(text.splitlines()) == 5


def test_a_method_without_parameters_says_so():
    with pytest.raises(MethodError, match="unknown parameter 'density'. It takes none"):
        get_method("average").parse({"density": 0.1})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_out_of_range(sample, value):
    with pytest.raises(MethodError, match="density"):
        sample.parse({"density": value})


@pytest.mark.parametrize("name", sorted(all_methods()))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_method_takes_a_parameter_that_is_no_finite_number(name, value):
    method = get_method(name)
    for field in dataclasses.fields(method.parameters):
        with pytest.raises(MethodError, match=field.name):
            method.parse({field.name: value})


@pytest.mark.parametrize(
    ("bounds", "count", "words"),
    [
        ((2, 2), 3, "exactly 2 experts, got 3"),
        ((2, None), 1, "at least 2 experts, got 1"),
        ((1, 3), 4, "1 to 3 experts, got 4"),
    ],
)
def test_expert_counts(table, bounds, count, words):
    register("fresh", summary="", takes=Takes(experts=bounds))(lambda d, p, c: d[0])
    with pytest.raises(MethodError, match=f"'fresh' takes {words}"):
        get_method("fresh").check_expert_count(count)
    get_method("fresh").check_expert_count(bounds[0])


def context(**more) -> Context:
    return Context(**{"weights": (1.0, 2.0), "experts": ("a", "b"), **more})


def test_weighing_keeps_deltas_of_weight_one_as_they_are():
    deltas = torch.ones(2, 3, 4)
    assert context(weights=(1.0, 1.0)).weigh(deltas) is deltas
    assert context().weigh(deltas)[:, 0, 0].tolist() == [1.0, 2.0]
    assert context().weigh(torch.ones(2, 3)).tolist() == [[1.0] * 3, [2.0] * 3]


def test_seeds_depend_on_seed_tensor_and_salt_alone():
    seeds = {
        context().seed_for("x"),
        context(seed=1).seed_for("x"),
        context(tensor="w").seed_for("x"),
        context().seed_for("y"),
        context().seed_for("x", "y"),
    }
    assert len(seeds) == 5
    assert context(weights=(3.0, 1.0), experts=("c", "d")).seed_for("x") == context().seed_for("x")


def test_seeds_are_the_same_on_any_machine_and_in_any_release():
    seed = context(seed=7, tensor="layer.weight").seed_for("dare", "a")
    assert seed == 4063148605122772213
