"""Matching keeps its identities: the dense solution, weights, counts, spaces and precision."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eutectic.errors import MethodError
from eutectic.methods import get_method, merge_matrices
from eutectic.methods.grams import Gram
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
    gram,
    mats,
    randn,
)

# --- the solution -----------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", ["none", "jacobi", "kronecker"])
@pytest.mark.parametrize("operator", MATRIX_OPERATORS)
def test_conjugate_gradients_reach_the_dense_solution(operator, preconditioner):
    deltas, statistics = randn(EXPERTS, OUT, IN), collect()
    found = converged(deltas, statistics, operator=operator, preconditioner=preconditioner)
    close(found, dense_solution(operator, deltas, statistics))


@pytest.mark.parametrize("operator", [o for o in MATRIX_OPERATORS if o != "kfac"])
def test_closed_forms_are_the_dense_solution(operator):
    deltas, statistics = randn(EXPERTS, OUT, IN), collect()
    merged = mats(deltas, statistics, operator=operator, solver="direct")
    close(merged.delta, dense_solution(operator, deltas, statistics), 1e-6)


def test_regmean_and_fisher_are_the_closed_forms():
    deltas, statistics = randn(EXPERTS, OUT, IN), collect()
    found = merge_matrices("regmean", deltas, statistics=statistics, off_diagonal=1.0)
    close(found, dense_solution("gram", deltas, statistics), 1e-6)
    found = merge_matrices("fisher", deltas, statistics=statistics)
    close(found, dense_solution("diagonal_fisher", deltas, statistics), 1e-6)


@settings(deadline=None, max_examples=20)
@given(
    experts=st.integers(1, 4), out=st.integers(1, 5), n=st.integers(1, 6), seed=st.integers(0, 99)
)
def test_identity_grams_make_regmean_the_average(experts, out, n, seed):
    deltas = randn(experts, out, n, seed=seed)
    statistics = [LayerStatistics(gram=torch.eye(n) * 9, count=9) for _ in range(experts)]
    mean = merge_matrices("average", deltas)
    torch.testing.assert_close(merge_matrices("regmean", deltas, statistics=statistics), mean)
    torch.testing.assert_close(converged(deltas, statistics, operator="gram"), mean)


@settings(deadline=None, max_examples=15)
@given(operator=st.sampled_from(MATRIX_OPERATORS), seed=st.integers(0, 99))
def test_copies_of_one_expert_give_that_expert(operator, seed):
    one = randn(OUT, IN, seed=seed) if operator != "task_gram" else randn(IN, IN, seed=seed)
    statistics = collect(seed=seed)
    found = converged(torch.stack([one] * EXPERTS), statistics, operator=operator)
    # Square task matrices have a condition that the tolerance is multiplied by.
    close(found, one, 1e-4 if operator != "task_gram" else 0.2)
    if operator != "task_gram":
        for method in ("regmean", "fisher"):
            stack = torch.stack([one] * EXPERTS)
            close(merge_matrices(method, stack, statistics=statistics), one, 1e-5)


@settings(deadline=None, max_examples=15)
@given(
    method=st.sampled_from(["regmean", "fisher", *MATRIX_OPERATORS]),
    order=st.permutations(range(EXPERTS)),
    seed=st.integers(0, 99),
)
def test_the_order_of_the_experts_does_not_matter(method, order, seed):
    deltas, statistics, weights = randn(EXPERTS, OUT, IN, seed=seed), collect(), [1.0, 0.5, 2.0]
    name, options = (method, {}) if method in ("regmean", "fisher") else (
        "mats", {"operator": method, "iterations": 4},
    )  # fmt: skip
    plain = merge_matrices(name, deltas, statistics=statistics, weights=weights, **options)
    shuffled = merge_matrices(
        name,
        deltas[list(order)],
        statistics=[statistics[t] for t in order],
        weights=[weights[t] for t in order],
        **options,
    )
    torch.testing.assert_close(plain, shuffled, rtol=1e-3, atol=1e-4)


# --- weights and counts ------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("operator", ["gram", "kfac", "diagonal_fisher", "block"])
def test_intermediate_task_weights_enter_both_sums(operator, share):
    deltas, statistics = randn(2, OUT, IN), collect(2)
    fields = ("gram", "fisher_diagonal", "block_fisher")
    scaled = [
        dataclasses.replace(s, **{f: getattr(s, f) * w for f in fields})
        for s, w in zip(statistics, (share, 1 - share), strict=True)
    ]
    found = converged(deltas, statistics, operator=operator, weights=[share, 1 - share])
    close(found, dense_solution(operator, deltas, scaled))
    if share in (0.0, 1.0):
        close(found, deltas[0 if share else 1])


def test_an_expert_of_weight_zero_needs_no_statistics():
    deltas, statistics = randn(2, OUT, IN), collect(2)
    found = merge_matrices("regmean", deltas, statistics=[statistics[0], None], weights=[0.5, 0.0])
    close(found, deltas[0], 1e-5)


@pytest.mark.parametrize("weights", [[1.0, -0.5, 1.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("method", ["regmean", "fisher", "mats"])
def test_weights_without_a_minimum_are_refused(method, weights):
    with pytest.raises(MethodError, match="at least 0, one of them positive"):
        merge_matrices(method, randn(EXPERTS, OUT, IN), statistics=collect(), weights=weights)


@pytest.mark.parametrize("method", ["regmean", "fisher", "mats"])
def test_seeing_the_same_data_twice_changes_nothing_unless_asked_to(method):
    deltas, once = randn(EXPERTS, OUT, IN), collect()
    twice = [
        dataclasses.replace(
            once[0],
            gram=2 * once[0].gram,
            fisher_diagonal=2 * once[0].fisher_diagonal,
            count=2 * once[0].count,
            sample_count=2 * once[0].sample_count,
        ),
        *once[1:],
    ]
    same = [merge_matrices(method, deltas, statistics=s) for s in (once, twice)]
    torch.testing.assert_close(*same)
    sums = [
        merge_matrices(method, deltas, statistics=s, normalize_counts=False) for s in (once, twice)
    ]
    assert not torch.allclose(*sums, rtol=1e-3)


# --- spaces, scale, precision -------------------------------------------------------------------


@pytest.mark.parametrize("rank", [60, 3])
@pytest.mark.parametrize("operator", ["gram", "kfac"])
def test_weight_and_delta_iterates_are_the_same(operator, rank):
    """Also on rank-deficient systems; only the stopping test is relative to another norm."""
    deltas, base = randn(EXPERTS, 8, 30).double(), 5 * randn(8, 30, seed=9).double()
    statistics = [
        LayerStatistics(gram=gram(rank, 30, t), output_gradient_gram=gram(60, 8, 9 + t), count=rank)
        for t in range(EXPERTS)
    ]
    for steps in (1, 3, 6):
        found = [
            mats(
                deltas,
                statistics,
                base=base,
                operator=operator,
                space=space,
                iterations=steps,
                tolerance=1e-13,
            )
            for space in ("delta", "weight")
        ]
        torch.testing.assert_close(found[0].delta, found[1].delta, rtol=1e-5, atol=1e-7)
    first = [
        mats(deltas, statistics, base=base, space=space, operator=operator).record["residuals"][0]
        for space in ("delta", "weight")
    ]
    assert first[1] < first[0]


def test_unexcited_directions_keep_the_base_in_delta_space_only():
    deltas, base = randn(EXPERTS, OUT, 20), randn(OUT, 20, seed=4)
    shared = randn(6, 20, seed=5)
    inputs = [randn(50, 6, seed=t) @ shared for t in range(EXPERTS)]
    statistics = [LayerStatistics(gram=x.T @ x, count=len(x)) for x in inputs]
    unexcited = torch.eye(20) - torch.linalg.pinv(shared) @ shared
    options = {"statistics": statistics, "off_diagonal": 1.0, "full_output": True, "base": base}
    kept = merge_matrices("regmean", deltas, **options)
    assert kept.record["ridge_escalated"] and kept.record["ridge"] < 1e-4
    assert float((kept.delta @ unexcited).norm()) < 0.05 * float(kept.delta.norm())
    lost = merge_matrices("regmean", deltas, space="weight", **options)
    close((base + lost.delta) @ unexcited + base @ unexcited, base @ unexcited, 0.1)
    seen = merge_matrices("mats", deltas, statistics=statistics, iterations=500, tolerance=1e-7)
    close(kept.delta @ shared.T, seen @ shared.T, 1e-2)


@pytest.mark.parametrize("operator", ["gram", "kfac", "block", "diagonal_fisher"])
@pytest.mark.parametrize("scale", [1e-14, 1e9])
def test_the_scale_of_the_statistics_does_not_matter(operator, scale):
    deltas, statistics = 1e-3 * randn(EXPERTS, OUT, IN), collect()
    if operator == "diagonal_fisher" and scale < 1:
        scale = 1e-4  # the published floor of 1e-8 is absolute
    fields = ("gram", "output_gradient_gram", "fisher_diagonal", "block_fisher")
    other = [
        dataclasses.replace(s, **{f: getattr(s, f) * scale for f in fields}) for s in statistics
    ]
    options = {"operator": operator, "iterations": 6, "preconditioner": "jacobi"}
    plain = mats(deltas, statistics, **options)
    close(mats(deltas, other, **options).delta, plain.delta, 1e-3)


def test_float32_goes_on_in_float64_where_it_stagnates():
    deltas, statistics = randn(EXPERTS, 6, 40), collect(out=6, n=40, rows=45)
    merged = mats(deltas, statistics, operator="kfac", iterations=20_000, tolerance=1e-10)
    assert (merged.record["status"], merged.record["dtype"]) == ("converged", "float64")
    assert merged.record["residuals"][-1] <= 1e-10
    assert merged.delta.dtype == torch.float32
    exact = mats(deltas, statistics, precision="exact", iterations=2)
    assert exact.record["dtype"] == "float64"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_grams_of_few_tokens_leave_the_rest_to_the_base(dtype, rows):
    """The minimum-norm solution by a pseudo-inverse: an error of 20 % once, of float64 Grams."""
    deltas = randn(3, 24, 26, seed=9)
    tokens = [randn(rows, 26, seed=t).to(dtype) for t in range(3)]
    statistics = [LayerStatistics(gram_factor=x, count=rows) for x in tokens]
    grams = [x.double().T @ x.double() / rows for x in tokens]
    right_side = sum(d.double() @ a for d, a in zip(deltas, grams, strict=True))
    expected = right_side @ torch.linalg.pinv(sum(grams), rcond=1e-8)
    merged = merge_matrices("regmean", deltas, statistics=statistics, off_diagonal=1.0)
    error = (merged.double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float64 else 2e-4)


@pytest.mark.parametrize("space", ["delta", "weight"])
def test_damping_draws_the_unknown_towards_zero(space):
    deltas, statistics, base = randn(EXPERTS, OUT, IN), collect(), randn(OUT, IN, seed=4)
    options = {"base": base, "space": space, "damping": 1e6}
    for solver in ("cg", "direct"):
        found = mats(deltas, statistics, solver=solver, iterations=50, **options).delta
        torch.testing.assert_close(
            found if space == "delta" else found + base, torch.zeros(OUT, IN), rtol=0, atol=1e-4
        )
    mild = [
        mats(deltas, statistics, solver=solver, damping=0.1, iterations=200, tolerance=1e-7).delta
        for solver in ("cg", "direct")
    ]
    close(*mild)


@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("operator", ["gram", "kfac"])
def test_the_kronecker_preconditioner_on_gradients_that_lie_in_a_subspace(
    operator, precision, damping
):
    """Those of a softmax add up to zero, and float32 rounds what is left in the null space."""
    out, n = 16, 24
    deltas, statistics = randn(EXPERTS, out, n), []
    for t in range(EXPERTS):
        y = randn(60, out, seed=t) * torch.arange(1, out + 1) ** -1.0
        y -= y.mean(1, keepdim=True)
        x = randn(60, n, seed=10 + t) * torch.arange(1, n + 1) ** -1.0
        x -= x.mean(1, keepdim=True)
        x[:, 3] = 0  # an input that is never active
        statistics.append(LayerStatistics(output_gradient_gram=y.T @ y, gram=x.T @ x, count=60))
    options = {"operator": operator, "precision": precision, "damping": damping}
    merged = mats(deltas, statistics, preconditioner="kronecker", iterations=200, **options)
    assert merged.record["status"] == "converged"
    plain = mats(deltas, statistics, iterations=3000, **options)
    assert merged.record["applications"] < plain.record["applications"]
    assert float(merged.delta.norm()) < 1.5 * float(plain.delta.norm())


def test_the_kronecker_preconditioner_knows_the_damping():
    deltas = randn(EXPERTS, 20, 30)
    falling = torch.arange(1, 31) ** -1.5
    statistics = [
        dataclasses.replace(s, gram=torch.outer(falling, falling) * s.gram)
        for s in collect(out=20, n=30)
    ]
    options = {"operator": "kfac", "damping": 0.1, "iterations": 300, "tolerance": 1e-6}
    plain = mats(deltas, statistics, **options)
    helped = mats(deltas, statistics, preconditioner="kronecker", **options)
    assert helped.record["iterations"] <= plain.record["iterations"] / 2
    close(helped.delta, plain.delta)


@pytest.mark.parametrize("steps", [3, 10])
@pytest.mark.parametrize("power", [1.5, 2.0])
@pytest.mark.parametrize("preconditioner", ["kronecker", "jacobi"])
def test_preconditioned_kfac_does_not_explode_by_default(steps, power, preconditioner):
    """Spectra that fall as those of language models do: directions that hardly any data excite."""
    out, n, tokens = 32, 48, 400
    turned = [torch.linalg.qr(randn(k, k, seed=50 + k))[0] for k in (n, out)]
    if preconditioner == "jacobi":  # which sees what lies along the axes
        turned = [torch.eye(n), torch.eye(out)]
    statistics, deltas = [], []
    for t in range(3):
        x = randn(tokens, n, seed=t) * torch.arange(1, n + 1) ** -power @ turned[0].T
        y = randn(tokens, out, seed=10 + t) * torch.arange(1, out + 1) ** -power @ turned[1].T
        gram, outer = x.T @ x, y.T @ y
        statistics.append(LayerStatistics(gram=gram, output_gradient_gram=outer, count=tokens))
        thin = randn(out, 4, seed=20 + t) @ randn(4, n, seed=30 + t)
        deltas.append(thin + 0.3 * randn(out, n, seed=40 + t))
    stack = torch.stack(deltas)
    mean = float(stack.flatten(1).norm(dim=1).mean())
    options = {"operator": "kfac", "preconditioner": preconditioner, "init": "iso_c"}
    options["iterations"] = steps

    def growth(**more):
        return float(mats(stack, statistics, **options, **more).delta.norm()) / mean

    assert growth(damping=0.0, trust=1e9) > 3
    assert growth(damping=0.0) < 2.1  # twice the largest expert
    assert growth() < 1.5
    assert growth() == growth(damping=0.01)


def test_nothing_else_is_damped_by_default():
    for options in (
        {"operator": "kfac"},
        {"operator": "gram", "preconditioner": "jacobi"},
        {"operator": "gram", "preconditioner": "kronecker"},
        {"operator": "block"},
        {"operator": "kfac", "preconditioner": "kronecker", "damping": 0.0},
    ):
        assert get_method("mats").parse(options).ridge() == 0


@pytest.mark.parametrize("operator", MATRIX_OPERATORS)
def test_views_are_as_good_as_copies(operator):
    deltas, base = randn(EXPERTS, IN, OUT).mT, randn(IN, OUT).mT
    found = [
        mats(d, collect(), base=b, operator=operator, space="weight", iterations=5, initial=b).delta
        for d, b in ((deltas, base), (deltas.contiguous(), base.contiguous()))
    ]
    torch.testing.assert_close(*found)


def test_the_plan_is_told_which_route_is_taken():
    entry = get_method("mats")
    assert entry.explain is not None
    routes = {
        "Cholesky": {"solver": "direct"},
        "eigenbasis": {"operator": "gram"},
        "preconditioner kronecker": {"operator": "kfac", "preconditioner": "kronecker"},
    }
    for word, options in routes.items():
        assert word in (entry.explain((8, 3072, 768), entry.parse(options), "fast") or "")


# --- vectors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("shape", [(9,), (9, 1), (3, 3)])
def test_vectors_by_block_fisher(shape, solver):
    deltas = randn(EXPERTS, *shape)
    statistics = [
        LayerStatistics(block_fisher=gram(40, 9, t), sample_count=40) for t in range(EXPERTS)
    ]
    merged = mats(deltas, statistics, operator="block", solver=solver, iterations=60)
    truth = dense_solution("block", deltas.reshape(EXPERTS, 1, 9), statistics)
    close(merged.delta, truth.view(shape), 1e-3)


def test_ten_steps_for_block_fisher_and_a_hundred_for_matrices_as_published():
    deltas = randn(EXPERTS, 30)
    statistics = [
        LayerStatistics(block_fisher=gram(31, 30, t), sample_count=31) for t in range(EXPERTS)
    ]
    assert mats(deltas, statistics, operator="block", tolerance=0).record["iterations"] == 10
    matrices = randn(EXPERTS, 4, 130)
    few = collect(out=4, n=130, rows=10)
    assert mats(matrices, few, operator="kfac", tolerance=0).record["iterations"] <= 100


@pytest.mark.parametrize("operator", ["diagonal_fisher", "identity"])
def test_elementwise_operators_take_vectors(operator):
    deltas = randn(EXPERTS, IN)
    statistics = [LayerStatistics(fisher_diagonal=torch.ones(IN), sample_count=1)] * EXPERTS
    close(converged(deltas, statistics, operator=operator), deltas.mean(0))
    close(merge_matrices("fisher", deltas, statistics=statistics), deltas.mean(0))


# --- factored Grams -----------------------------------------------------------------------------


@pytest.mark.parametrize("off_diagonal", [1.0, 0.6])
@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize(
    ("method", "operator"), [("mats", "gram"), ("mats", "kfac"), ("regmean", "")]
)
def test_a_factor_is_as_good_as_its_gram(method, operator, rows, off_diagonal):
    n = 16
    deltas, factored, dense = randn(EXPERTS, OUT, n), [], []
    for t in range(EXPERTS):
        common = {"count": 30, "output_gradient_gram": gram(20, OUT, t)}
        form = LayerStatistics(
            gram_factor=randn(rows, n, seed=t), gram_diagonal=randn(n, seed=t).abs(), **common
        )
        factored.append(form)
        dense.append(LayerStatistics(gram=form.dense_gram(), **common))
    mixed = [dense[0], *factored[1:]]
    options: dict[str, object] = {"off_diagonal": off_diagonal}
    if operator:
        options |= {"operator": operator, "iterations": 5}
    reference = merge_matrices(method, deltas.double(), statistics=dense, **options)
    for statistics in (factored, mixed):
        found = merge_matrices(method, deltas.double(), statistics=statistics, **options)
        torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-6)


# --- preconditioning ----------------------------------------------------------------------------


def power_law(n: int, power: float, seed: int, basis: Tensor, tilt: float) -> Tensor:
    """Return a Gram with eigenvalues i^-power in nearly the directions of `basis`."""
    values = torch.arange(1, n + 1, dtype=torch.float64) ** -power
    Q = torch.linalg.qr(basis + tilt * randn(n, n, seed=seed).double())[0]
    return ((Q * values) @ Q.T).float()


@pytest.mark.parametrize("tilt", [0.02, 1.0])
@pytest.mark.parametrize("power", [1.5, 2.0])
def test_the_kronecker_preconditioner_needs_a_quarter_of_the_applications(power, tilt):
    out, n = 32, 48
    bases = [torch.linalg.qr(randn(k, k, seed=1).double())[0] for k in (out, n)]
    statistics = [
        LayerStatistics(
            output_gradient_gram=power_law(out, power, t, bases[0], tilt),
            gram=power_law(n, power, 10 + t, bases[1], tilt),
            count=1,
        )
        for t in range(4)
    ]
    counts = {}
    for preconditioner in ("none", "kronecker"):
        record = mats(
            1e-2 * randn(4, out, n),
            statistics,
            operator="kfac",
            preconditioner=preconditioner,
            damping=0.0,
            trust=1e9,
            iterations=4000,
            tolerance=1e-5,
        ).record
        assert record["status"] == "converged" and record["residuals"][-1] <= 1e-5
        counts[preconditioner] = record["applications"]
    assert counts["kronecker"] <= counts["none"] / 4


@pytest.mark.parametrize("off_diagonal", [1.0, 0.7])
def test_kfac_by_triangular_factors_is_kfac_by_grams(off_diagonal):
    out, n, rows = 6, 600, 520
    generator = torch.Generator().manual_seed(2)
    deltas = torch.randn(EXPERTS, out, n, generator=generator, dtype=torch.float64)
    dense, factored = [], []
    for _ in range(EXPERTS):
        factor = torch.randn(rows, n, generator=generator, dtype=torch.float64).triu()
        outputs = torch.randn(9, out, generator=generator, dtype=torch.float64)
        common = {"output_gradient_gram": outputs.T @ outputs, "count": rows}
        dense.append(LayerStatistics(gram=factor.T @ factor, **common))
        factored.append(LayerStatistics(gram_factor=factor, **common))
    options = {"operator": "kfac", "iterations": 5, "off_diagonal": off_diagonal}
    expected = merge_matrices("mats", deltas, statistics=dense, **options)
    found = merge_matrices("mats", deltas, statistics=factored, **options)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_a_gram_multiplies_alike_in_every_form():
    generator = torch.Generator().manual_seed(3)
    n, rows = 40, 12
    x, left = (torch.randn(5, k, generator=generator, dtype=torch.float64) for k in (n, 5))
    for factor in (
        torch.randn(rows, n, generator=generator, dtype=torch.float64),
        torch.randn(rows, n, generator=generator, dtype=torch.float64).triu(),
    ):
        remainder = torch.rand(n, generator=generator, dtype=torch.float64)
        whole = 0.3 * factor.T @ factor + remainder.diag()
        forms = (Gram(None, factor, remainder, 0.0, 0.3), Gram(whole / 2, None, None, 0.0, 2.0))
        for form in (*forms, *(form.cheapest() for form in forms)):
            torch.testing.assert_close(form.dense(), whole)
            torch.testing.assert_close(form.diagonal(), whole.diagonal())
            for h in (None, Gram(left, None, None, 0.0, 0.5), Gram(None, left, left[0], 0.0, 0.5)):
                expected = 1 + (x if h is None else h.dense() @ x) @ whole
                found = form.add_product(torch.ones_like(x), x, left=h)
                torch.testing.assert_close(found, expected)
