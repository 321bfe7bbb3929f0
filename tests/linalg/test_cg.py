"""Conjugate gradients: right answers, SciPy's iterates, and an honest status when they fail."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eutectic.linalg.cg import (
    Trust,
    conjugate_gradients,
    conjugate_gradients_by_eigenbasis,
    eigenbasis_pays,
    inner,
    jacobi,
    kronecker,
    norm,
)


def spd(n: int, seed: int, condition: float = 50.0, rank: int | None = None) -> Tensor:
    """Return a float64 matrix with eigenvalues from 1 to 1/condition, zero beyond `rank`."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    if rank is not None:
        values[rank:] = 0
    return (Q * values) @ Q.T


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@settings(deadline=None, max_examples=25)
@given(
    out=st.integers(1, 7), n=st.integers(1, 9), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_agrees_with_a_dense_solve(out, n, seed, dtype):
    A, H = spd(n, seed).to(dtype), spd(out, seed + 1).to(dtype)
    truth = randn(out, n, seed=seed + 2).to(dtype)
    start = randn(out, n, seed=seed + 3).to(dtype)
    kept = start.clone()
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5  # float32 can stagnate at 1e-6
    result = conjugate_gradients(
        lambda x: H @ x @ A, H @ truth @ A, initial=start, iterations=2000, tolerance=tolerance
    )
    assert result.status == "converged"
    assert result.solution.dtype == dtype
    assert relative(result.solution, truth) < 5e3 * tolerance  # condition 2500 times the tolerance
    assert torch.equal(start, kept)


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_iterates_are_those_of_scipy(steps, preconditioned):
    sparse = pytest.importorskip("scipy.sparse.linalg")
    A, b, x0 = spd(20, 1, 300.0), randn(1, 20, seed=2), randn(1, 20, seed=3)
    M = torch.diag(1 / A.diagonal()).numpy() if preconditioned else None
    theirs, _ = sparse.cg(A.numpy(), b[0].numpy(), x0[0].numpy(), rtol=0, maxiter=steps, M=M)
    ours = conjugate_gradients(
        lambda x: x @ A,
        b,
        initial=x0,
        iterations=steps,
        tolerance=0,
        preconditioner=jacobi(A.diagonal()) if preconditioned else None,
    )
    assert relative(ours.solution, torch.from_numpy(theirs)[None]) < 1e-10
    assert ours.iterations == steps and ours.status == "iteration_limit"
    assert len(ours.residuals) == steps + 1


@pytest.mark.parametrize("centred", [False, True])
def test_the_step_that_leaves_the_trusted_ball_ends_on_it(centred):
    A, b, start = spd(20, 1, 1e4), randn(1, 20, seed=2), randn(1, 20, seed=3)
    center = randn(1, 20, seed=4) if centred else torch.zeros(1, 20, dtype=torch.float64)
    free = [
        conjugate_gradients(lambda x: x @ A, b, initial=start, iterations=k, tolerance=0).solution
        for k in range(12)
    ]
    distances = [norm(x - center) for x in free]
    radius = (distances[8] + distances[9]) / 2
    first = next(k for k, distance in enumerate(distances) if distance > radius)
    assert max(distances[0], distances[1]) < radius and first > 1
    trust = Trust(radius, center if centred else None)
    result = conjugate_gradients(
        lambda x: x @ A, b, initial=start, iterations=12, tolerance=0, trust=trust
    )
    assert (result.status, result.iterations) == ("trust_limit", first)
    assert norm(result.solution - center) == pytest.approx(radius, rel=1e-12)
    # It lies between the two iterates of the free run.
    before, after = free[first - 1], free[first]
    share = norm(result.solution - before) / norm(after - before)
    assert relative(result.solution, before + share * (after - before)) < 1e-10
    assert result.residuals[-1] == pytest.approx(norm(b - result.solution @ A) / norm(b), rel=1e-9)


def test_a_ball_that_no_step_leaves_changes_no_bit():
    A, b, start = spd(20, 1, 300.0), randn(1, 20, seed=2), randn(1, 20, seed=3)
    far = conjugate_gradients(lambda x: x @ A, b, initial=start)
    near = conjugate_gradients(lambda x: x @ A, b, initial=start, trust=Trust(1e6))
    assert torch.equal(far.solution, near.solution) and far.status == near.status == "converged"


def test_a_guess_outside_the_trusted_ball_widens_it():
    A, b, start = spd(20, 1, 300.0), randn(1, 20, seed=2), randn(1, 20, seed=3)
    start *= 1e5
    result = conjugate_gradients(lambda x: x @ A, b, initial=start, trust=Trust(1e-3))
    assert result.status == "converged"


def test_ends_after_as_many_steps_as_there_are_eigenvalues():
    values = torch.tensor([1.0, 1.0, 2.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    result = conjugate_gradients(lambda x: x * values, randn(6), tolerance=1e-12)
    assert (result.status, result.iterations) == ("converged", 3)


def test_the_last_residual_is_recomputed_from_its_definition():
    A, b = spd(15, 4).float(), randn(4, 15).float()
    for limit, tolerance in ((30, 0.0), (100, 1e-5)):  # out of steps near rounding, and converged
        result = conjugate_gradients(lambda x: x @ A, b, iterations=limit, tolerance=tolerance)
        assert result.residuals[-1] == norm(b - result.solution @ A) / norm(b)
        assert result.applications > result.iterations


def test_early_stopping_costs_no_further_application():
    A, b = spd(60, 4, 1e6).float(), randn(4, 60).float()
    result = conjugate_gradients(lambda x: x @ A, b, iterations=7)
    assert (result.status, result.applications) == ("iteration_limit", 7)
    assert result.residuals[-1] == pytest.approx(norm(b - result.solution @ A) / norm(b), rel=1e-3)


def test_starting_at_the_solution_takes_no_step():
    A, truth = spd(8, 0), randn(3, 8)
    result = conjugate_gradients(lambda x: x @ A, truth @ A, initial=truth)
    assert (result.status, result.iterations) == ("converged", 0)
    assert torch.equal(result.solution, truth)


def test_zero_right_side_gives_zero():
    result = conjugate_gradients(lambda x: x, torch.zeros(2, 3), initial=torch.ones(2, 3))
    assert result.status == "converged" and not result.solution.any()


def test_the_null_space_keeps_the_start():
    A = spd(10, 5, rank=6)
    null = torch.eye(10, dtype=torch.float64) - torch.linalg.pinv(A) @ A
    start = randn(3, 10, seed=1)
    result = conjugate_gradients(
        lambda x: x @ A, randn(3, 10, seed=2) @ A, initial=start, tolerance=1e-10
    )
    assert result.status == "converged"
    torch.testing.assert_close(result.solution @ null, start @ null, atol=1e-9, rtol=0)


def test_an_indefinite_operator_breaks_down_at_the_last_good_iterate():
    values = torch.tensor([3.0, 2.0, 1.0, -1.0], dtype=torch.float64)
    b = torch.tensor([1.0, 1.0, 1.0, 1.4], dtype=torch.float64)
    result = conjugate_gradients(lambda x: x * values, b)
    assert result.status == "breakdown"
    assert bool(torch.isfinite(result.solution).all())
    before = conjugate_gradients(lambda x: x * values, b, iterations=result.iterations)
    assert torch.equal(result.solution, before.solution)


def test_a_system_without_solution_breaks_down():
    values = torch.tensor([1.0, 0.0])
    result = conjugate_gradients(lambda x: x * values, torch.tensor([1.0, 1.0]), tolerance=1e-6)
    assert result.status == "breakdown"
    assert bool(torch.isfinite(result.solution).all())


def test_nan_from_the_operator_keeps_the_iterate_before_it():
    A, b = spd(12, 7), randn(2, 12)
    calls = 0

    def operator(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x @ A if calls < 4 else x * math.nan

    result = conjugate_gradients(operator, b)
    assert (result.status, result.iterations) == ("non_finite", 3)
    three = conjugate_gradients(lambda x: x @ A, b, iterations=3)
    assert torch.equal(result.solution, three.solution)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_right_side_that_is_not_finite_is_reported(bad):
    result = conjugate_gradients(lambda x: x, torch.tensor([1.0, bad]), initial=torch.ones(2))
    assert result.status == "non_finite" and torch.equal(result.solution, torch.ones(2))


def test_too_narrow_a_dtype_is_reported_as_stagnation():
    A = spd(40, 3, 1e4).float()
    truth = randn(5, 40).float()
    result = conjugate_gradients(
        lambda x: x @ A, truth @ A, initial=10 * truth, iterations=3000, tolerance=1e-9
    )
    assert result.status == "stagnated"
    assert 1e-9 < result.residuals[-1] < 1e-5


@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1e10])
def test_scale_of_the_system_does_not_matter(scale):
    A, truth = spd(10, 2).float() * scale, randn(3, 10).float() * 1e-3
    result = conjugate_gradients(lambda x: x @ A, truth @ A, tolerance=1e-5)
    assert result.status == "converged" and relative(result.solution, truth) < 1e-3


def test_inner_products_are_summed_in_double_precision():
    x = torch.full((200_001,), 1e-25)
    assert inner(x, x) == pytest.approx(200_001 * float(x[0]) ** 2, rel=1e-12)
    assert norm(x) == pytest.approx(200_001**0.5 * float(x[0]), rel=1e-12)


@settings(deadline=None, max_examples=25)
@given(
    out=st.integers(1, 6), n=st.integers(1, 12), steps=st.integers(0, 15),
    rank=st.integers(1, 12), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_eigenbasis_gives_the_same_iterates(out, n, steps, rank, seed):
    A = spd(n, seed, rank=min(rank, n))
    b = randn(out, n, seed=seed + 1) @ A
    start = randn(out, n, seed=seed + 2)
    plain = conjugate_gradients(lambda x: x @ A, b, initial=start, iterations=steps, tolerance=1e-7)
    fast = conjugate_gradients_by_eigenbasis(A, b, initial=start, iterations=steps, tolerance=1e-7)
    assert fast.status == plain.status
    assert fast.iterations == plain.iterations
    torch.testing.assert_close(fast.solution, plain.solution, rtol=1e-6, atol=1e-6)
    # Below the tolerance a residual is what rounding makes of it.
    torch.testing.assert_close(
        torch.tensor(fast.residuals), torch.tensor(plain.residuals), rtol=1e-3, atol=1e-7
    )


def test_the_eigenbasis_reports_an_indefinite_matrix_and_a_narrow_dtype():
    A = torch.diag(torch.tensor([3.0, 2.0, 1.0, -1.0], dtype=torch.float64))
    b = torch.tensor([[1.0, 1.0, 1.0, 1.4]], dtype=torch.float64)
    zero = torch.zeros_like(b)
    assert conjugate_gradients_by_eigenbasis(A, b, initial=zero).status == "breakdown"
    narrow = spd(30, 1).float()
    right = randn(4, 30).float() @ narrow
    result = conjugate_gradients_by_eigenbasis(
        narrow, right, initial=torch.zeros_like(right), tolerance=1e-12
    )
    assert result.status == "stagnated" and result.residuals[-1] < 1e-5


def test_the_eigenbasis_is_for_many_rows_and_many_steps():
    assert eigenbasis_pays(3072, 768, 10)
    assert eigenbasis_pays(768, 3072, 100)
    assert not eigenbasis_pays(768, 3072, 10)


def test_the_kronecker_preconditioner_inverts_a_kronecker_product():
    H, A = spd(6, 1, 1e4), spd(9, 2, 1e4)
    b = H @ randn(6, 9) @ A
    result = conjugate_gradients(
        lambda x: H @ x @ A, b, preconditioner=kronecker(H, A, b.dtype), tolerance=1e-8
    )
    assert result.status == "converged" and result.iterations <= 2


def test_preconditioners_survive_singular_and_indefinite_factors():
    A = spd(9, 2, rank=4)
    b = randn(3, 9) @ A
    result = conjugate_gradients(lambda x: x @ A, b, preconditioner=kronecker(None, A, b.dtype))
    assert result.status == "converged"
    indefinite = torch.diag(torch.tensor([1.0, -9.0]))
    r = torch.ones(3, 2)
    assert torch.equal(kronecker(None, indefinite, r.dtype)(r), r)
    assert torch.equal(jacobi(torch.tensor([2.0, 0.0]))(r), torch.tensor([[0.5, 1.0]] * 3))
