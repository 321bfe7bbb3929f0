"""Every start, and every kind of missing or bad statistics, has a stated outcome in matching."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from eutectic.errors import MethodError, NumericalError
from eutectic.methods import merge_matrices
from eutectic.methods.registry import get_method
from eutectic.types import LayerStatistics

from .matching_cases import (
    EXPERTS,
    IN,
    MATRIX_OPERATORS,
    OUT,
    close,
    collect,
    converged,
    dense_solution,
    mats,
    randn,
)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preconditioner", ["none", "kronecker"])
def test_a_singular_sum_keeps_the_guess_where_no_input_reaches(preconditioner, dtype, rows):
    """Inputs of rank 12 in 64: the other directions keep x₀, the reached ones match the experts."""
    g = torch.Generator().manual_seed(3)
    width, experts = 64, 3
    deltas = 0.1 * torch.randn(experts, 20, width, generator=g).to(dtype)
    inputs = torch.randn(experts, 4, width, generator=g).to(dtype)
    grams = inputs.mT @ inputs
    statistics = [
        LayerStatistics(gram=None, gram_factor=x, count=4) if rows else
        LayerStatistics(gram=a, count=4)
        for x, a in zip(inputs, grams, strict=True)
    ]  # fmt: skip
    found = merge_matrices(
        "mats", deltas, statistics=statistics, preconditioner=preconditioner, init_scale=0.3
    )
    start = 0.3 * deltas.sum(0).double()
    basis = torch.linalg.svd(inputs.flatten(0, 1).double())[2]
    hidden = (found.double() - start) @ basis[12:].mT
    assert float(hidden.norm() / start.norm()) < 1e-4
    total = grams.double().sum(0)
    wanted = (deltas.double() @ grams.double()).sum(0)
    assert float((found.double() @ total - wanted).norm() / wanted.norm()) < 2e-5


# --- initial guesses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "scale", "expected"),
    [
        ("task_arithmetic", None, 0.3),
        ("task_arithmetic", 0.5, 0.5),
        ("average", None, 1 / EXPERTS),
        ("zero", None, 0.0),
    ],
)
def test_without_steps_the_initial_guess_comes_back(init, scale, expected):
    deltas = randn(EXPERTS, OUT, IN)
    merged = mats(deltas, collect(), init=init, init_scale=scale, iterations=0)
    torch.testing.assert_close(merged.delta, expected * deltas.sum(0))
    assert merged.record["status"] == "iteration_limit"


@pytest.mark.parametrize("init", ["iso_c", "iso_cts", "tsv_m", "ties", "regmean", "slerp"])
def test_any_method_gives_a_start_and_the_same_end(init):
    experts = 2 if init == "slerp" else EXPERTS
    deltas, statistics = randn(experts, OUT, IN), collect(experts)
    base = randn(OUT, IN, seed=8)
    start = mats(deltas, statistics, init=init, init_scale=0.7, iterations=0, base=base)
    alone = merge_matrices(init, deltas, statistics=statistics, base=base)
    torch.testing.assert_close(start.delta, 0.7 * alone)
    end = converged(deltas, statistics, init=init, base=base)
    close(end, dense_solution("gram", deltas, statistics))


def test_a_given_delta_is_the_start_whatever_init_says():
    given_delta = randn(OUT, IN, seed=3)
    merged = mats(
        randn(EXPERTS, OUT, IN), collect(), initial=given_delta, init="merged/model", iterations=0
    )
    torch.testing.assert_close(merged.delta, given_delta)
    assert merged.record["init"]["from"] == "given"


def test_an_init_that_cannot_start_is_refused():
    with pytest.raises(MethodError, match="Did you mean 'iso_cts'"):
        mats(randn(EXPERTS, OUT, IN), collect(), init="iso_ctss")
    with pytest.raises(MethodError, match="needs an initial guess itself"):
        mats(randn(EXPERTS, OUT, IN), collect(), init="mats")


# --- statistics that are missing or bad ---------------------------------------------------------


def _without(statistics: list[LayerStatistics], case: str) -> list[LayerStatistics | None] | None:
    if case == "nothing":
        return None
    bad = {
        "no entry": None,
        "no gram": LayerStatistics(count=5),
        "no tokens": LayerStatistics(
            gram=torch.zeros(IN, IN), fisher_diagonal=torch.zeros(OUT, IN),
            output_gradient_gram=torch.zeros(OUT, OUT), count=0,
        ),
    }  # fmt: skip
    return [statistics[0], bad[case], statistics[2]]


@pytest.mark.parametrize("case", ["nothing", "no entry", "no gram", "no tokens"])
@pytest.mark.parametrize("method", ["regmean", "fisher", "gram", "kfac"])
def test_missing_statistics_take_the_average_and_say_so(method, case):
    deltas, statistics = randn(EXPERTS, OUT, IN), _without(collect(), case)
    name, options = ("mats", {"operator": method}) if method in MATRIX_OPERATORS else (method, {})
    options["full_output"] = True
    if case != "no tokens":  # a layer that saw no token is no lack of statistics
        with pytest.raises(MethodError, match="needs statistics with .* for every expert"):
            merge_matrices(name, deltas, statistics=statistics, **options)
        options["fallback"] = "allow"
    merged = merge_matrices(name, deltas, statistics=statistics, **options)
    torch.testing.assert_close(merged.delta, deltas.mean(0))
    assert merged.record["rest"] == "average"
    assert "expert '" in merged.record["reason"]


def test_missing_statistics_take_the_initial_guess_where_asked_to():
    deltas = randn(EXPERTS, OUT, IN)
    merged = mats(deltas, None, rest="init", init="iso_c", init_scale=1.0, fallback="allow")
    torch.testing.assert_close(merged.delta, merge_matrices("iso_c", deltas))
    assert merged.record["rest"] == "init" and merged.record["init"]["from"] == "iso_c"
    vector = mats(randn(EXPERTS, IN), None, rest="init", init="iso_c")
    torch.testing.assert_close(vector.delta, randn(EXPERTS, IN).mean(0))


@pytest.mark.parametrize("operator", ["gram", "kfac", "task_gram"])
def test_vectors_are_averaged_by_operators_for_matrices(operator):
    deltas = randn(EXPERTS, IN)
    merged = mats(deltas, collect(), operator=operator)
    torch.testing.assert_close(merged.delta, deltas.mean(0))
    assert "is for matrices" in merged.record["reason"]


@pytest.mark.parametrize("method", ["regmean", "mats"])
def test_statistics_that_are_all_zero_are_averaged(method):
    deltas = randn(EXPERTS, OUT, IN)
    statistics = [LayerStatistics(gram=torch.zeros(IN, IN), count=4)] * EXPERTS
    merged = merge_matrices(method, deltas, statistics=statistics, full_output=True)
    torch.testing.assert_close(merged.delta, deltas.mean(0))
    assert merged.record["rest"] == "average"


@pytest.mark.parametrize("method", ["regmean", "fisher", "mats"])
def test_a_sum_without_a_count_is_refused(method):
    statistics = [dataclasses.replace(s, count=0, sample_count=0) for s in collect()]
    with pytest.raises(MethodError, match="is not zero but its count is 0"):
        merge_matrices(method, randn(EXPERTS, OUT, IN), statistics=statistics)
    merge_matrices(method, randn(EXPERTS, OUT, IN), statistics=statistics, normalize_counts=False)


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({}, "gram", torch.eye(IN + 1)),
        ({"operator": "kfac"}, "output_gradient_gram", torch.eye(OUT + 1)),
        ({"operator": "diagonal_fisher"}, "fisher_diagonal", torch.ones(IN, OUT)),
        ({"operator": "block"}, "block_fisher", torch.eye(IN)),
    ],
)
def test_statistics_of_another_shape_are_refused_with_both_shapes(options, field, value):
    statistics = collect()
    statistics[1] = dataclasses.replace(statistics[1], **{field: value})
    with pytest.raises(MethodError, match=rf"expert '1': {field} has shape .* asks for"):
        mats(randn(EXPERTS, OUT, IN), statistics, **options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("method", "options", "field"),
    [
        ("regmean", {}, "gram"),
        ("fisher", {}, "fisher_diagonal"),
        ("mats", {"operator": "kfac"}, "output_gradient_gram"),
        ("mats", {"operator": "block"}, "block_fisher"),
    ],
)
def test_nan_in_the_statistics_is_refused(method, options, field, bad):
    statistics = collect()
    value = getattr(statistics[2], field).clone()
    value.view(-1)[3] = bad
    statistics[2] = dataclasses.replace(statistics[2], **{field: value})
    with pytest.raises(NumericalError, match=f"expert '2': NaN or Inf in {field}"):
        merge_matrices(method, randn(EXPERTS, OUT, IN), statistics=statistics, **options)


def test_zero_rows_stay_zero_and_inputs_that_are_never_active_keep_the_base():
    deltas, statistics = randn(EXPERTS, OUT, IN), collect()
    deltas[:, 2] = 0
    dead = []
    for s in statistics:
        assert s.gram is not None
        keep = torch.ones(IN)
        keep[4] = 0
        dead.append(dataclasses.replace(s, gram=s.gram * torch.outer(keep, keep)))
    for found in (
        merge_matrices("regmean", deltas, statistics=dead),
        converged(deltas, dead, operator="gram", init="zero"),
        converged(deltas, dead, operator="kfac", init="zero"),
    ):
        torch.testing.assert_close(found[:, 4], torch.zeros(OUT), rtol=0, atol=1e-6)
        assert bool(torch.isfinite(found).all())
    assert not merge_matrices("regmean", deltas, statistics=dead)[2].any()


def test_the_base_is_asked_for_only_where_weights_are_the_unknown():
    deltas, statistics = randn(EXPERTS, OUT, IN), collect()
    for method in ("regmean", "mats"):
        with pytest.raises(MethodError, match="needs base"):
            merge_matrices(method, deltas, statistics=statistics, space="weight")


def test_kfac_has_no_closed_form():
    with pytest.raises(MethodError, match="no closed form"):
        mats(randn(EXPERTS, OUT, IN), collect(), operator="kfac", solver="direct")


def test_inputs_are_left_alone():
    deltas, statistics = randn(EXPERTS, OUT, IN), collect()
    kept = [deltas.clone(), *(s.gram.clone() for s in statistics if s.gram is not None)]
    for operator in MATRIX_OPERATORS:
        mats(deltas, statistics, operator=operator, damping=0.1, off_diagonal=0.5)
    merge_matrices("regmean", deltas, statistics=statistics)
    for before, after in zip(kept, [deltas, *(s.gram for s in statistics)], strict=True):
        assert torch.equal(before, after)


# --- steps that would leave the experts behind ----------------------------------------------------


@pytest.mark.parametrize("space", ["delta", "weight"])
@pytest.mark.parametrize("preconditioner", ["none", "jacobi", "kronecker"])
def test_kfac_steps_end_where_the_merge_would_outgrow_its_experts(preconditioner, space):
    deltas, base = randn(EXPERTS, OUT, IN), randn(OUT, IN, seed=8)
    statistics = collect(rows=2)  # so few that most directions have hardly any curvature
    options = {"operator": "kfac", "preconditioner": preconditioner, "damping": 0.0}
    options |= {"space": space, "init": "zero", "iterations": 500, "tolerance": 0.0}
    largest = float(max(delta.norm() for delta in deltas))
    free = mats(deltas, statistics, base=base, trust=1e9, **options).delta
    bound = 0.5 * float(free.norm()) / largest
    merged = mats(deltas, statistics, base=base, trust=bound, **options)
    assert merged.record["status"] == "trust_limit"
    assert float(merged.delta.norm()) == pytest.approx(bound * largest, rel=1e-5)


def test_the_bound_of_kfac_is_twice_the_largest_expert():
    parse = get_method("mats").parse
    deltas = torch.stack([torch.eye(3), 2 * torch.eye(3)])
    assert parse({"operator": "kfac"}).largest(deltas) == pytest.approx(4 * 3**0.5)
    assert parse({"operator": "kfac", "trust": 5}).largest(deltas) == pytest.approx(10 * 3**0.5)
    assert parse({"operator": "gram"}).largest(deltas) is None
    assert parse({"trust": 1}).largest(deltas) == pytest.approx(2 * 3**0.5)
