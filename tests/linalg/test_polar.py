"""Polar factors: every route against the float64 SVD, on spectra that break naive kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eutectic.linalg.gram import explain_routes
from eutectic.linalg.lowrank import LowRank
from eutectic.linalg.polar import choose_route, explain_polar, polar

from .spectra import SPECTRA, distance, geometric, lora_sum, power_law, with_spectrum

SHAPES = [(40, 40), (90, 30), (30, 90)]
ROUTES = ["gram", "halley", "products", None]


def reference(matrix, support, tolerance):
    """Textbook polar factor in float64."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = len(S) if support == "full" else int((S > tolerance * S[0]).sum())
    return U[:, :kept] @ Vh[:kept], float(S[:kept].sum()), kept


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("support", ["numerical", "full"])
def test_agrees_with_the_svd(route, shape, spectrum, support):
    matrix = with_spectrum(*shape, SPECTRA[spectrum](30 if 30 in shape else 40)).float()
    ours = polar(matrix, support=support, rank_tolerance=1.3e-5, route=route)
    factor, nuclear_norm, rank = reference(matrix, support, 1.3e-5)
    assert ours.rank == rank
    assert distance(ours.factor, factor) <= 1e-4
    assert ours.nuclear_norm == pytest.approx(nuclear_norm, rel=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_full_support_of_ill_conditioned_float64(route):
    matrix = with_spectrum(50, 40, geometric(40, 1e9))
    ours = polar(matrix, support="full", route=route)
    assert ours.rank == 40
    assert distance(ours.factor, reference(matrix, "full", 0)[0]) <= 1e-4


@pytest.mark.parametrize("route", [*ROUTES, "svd"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("support", ["numerical", "full"])
def test_condition_1e12_in_float64(route, shape, support):
    matrix = with_spectrum(*shape, geometric(min(shape), 1e12))
    ours = polar(matrix, support=support, route=route)
    factor, nuclear_norm, _ = reference(matrix, "full", 0)
    assert (ours.rank, ours.route) == (min(shape), "svd")
    assert distance(ours.factor, factor) <= 1e-4
    assert ours.nuclear_norm == pytest.approx(nuclear_norm, rel=1e-6)


@pytest.mark.parametrize("norm", [1e-30, 1e30])
@pytest.mark.parametrize("shape", [(150, 150), (200, 150), (150, 200)])
def test_halley_at_huge_and_tiny_norms(shape, norm):
    matrix = (with_spectrum(*shape, geometric(150, 5)) * norm).float()
    ours = polar(matrix)
    assert ours.route == "halley"
    factor, nuclear_norm, _ = reference(matrix, "full", 0)
    assert distance(ours.factor, factor) <= 1e-4
    assert ours.nuclear_norm == pytest.approx(nuclear_norm, rel=1e-6)


@settings(deadline=None, max_examples=80)
@given(
    spectrum=st.sampled_from(list(SPECTRA)),
    out=st.integers(1, 24),
    inner=st.integers(1, 24),
    support=st.sampled_from(["numerical", "full"]),
    route=st.sampled_from([*ROUTES, "svd"]),
    seed=st.integers(0, 99),
)
def test_any_spectrum_and_shape(spectrum, out, inner, support, route, seed):
    matrix = with_spectrum(out, inner, SPECTRA[spectrum](min(out, inner)), seed).float()
    ours = polar(matrix, support=support, rank_tolerance=1.3e-5, route=route)
    factor, nuclear_norm, rank = reference(matrix, support, 1.3e-5)
    assert ours.rank == rank
    assert distance(ours.factor, factor) <= 1e-4
    # Newton–Schulz ends with a step from up to √(50·eps), which leaves 3/8·50·eps = 2.3e-6.
    rounding = 5e-6 if ours.route == "products" else 1e-6
    assert ours.nuclear_norm == pytest.approx(nuclear_norm, rel=rounding)


@pytest.mark.parametrize(
    ("route", "spectrum"),
    [
        ("gram", power_law(150)),
        ("gram", geometric(150, 1e3)),
        ("gram", geometric(150, 1e4)),
        ("halley", torch.linspace(1, 0.8, 150).double()),
        ("halley", geometric(150, 10)),
    ],
)
@pytest.mark.parametrize("shape", [(150, 150), (200, 150), (150, 900)])
def test_routes_do_not_fall_back_where_they_should_hold(shape, spectrum, route):
    matrix = with_spectrum(*shape, spectrum).float()
    ours = polar(matrix, support="full", route=route)
    assert ours.route == route
    assert distance(ours.factor, reference(matrix, "full", 0)[0]) <= 3e-5


@pytest.mark.parametrize("spectrum", [geometric(150, 30), geometric(150, 1e3), power_law(150)])
def test_halley_declines_what_float32_steps_would_spoil(spectrum):
    matrix = with_spectrum(200, 150, spectrum).float()
    assert polar(matrix, route="halley").route == "gram"


def test_halley_declines_a_tolerance_inside_its_spectrum():
    matrix = with_spectrum(200, 150, geometric(150, 10)).float()
    ours = polar(matrix, rank_tolerance=0.2, route="halley")
    assert ours.route == "gram"
    assert ours.rank == reference(matrix, "numerical", 0.2)[2]


def test_newton_schulz_holds_on_moderate_condition():
    matrix = with_spectrum(200, 150, geometric(150, 100)).float()
    ours = polar(matrix, route="products")
    assert ours.route == "products"
    assert distance(ours.factor, reference(matrix, "full", 0)[0]) <= 1e-5


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("norm", [1e-30, 1e30])
def test_huge_and_tiny_norms(route, norm):
    matrix = with_spectrum(40, 30, power_law(30))
    ours = polar((matrix * norm).float(), route=route)
    assert distance(ours.factor, reference(matrix, "full", 0)[0]) <= 1e-5
    assert ours.nuclear_norm == pytest.approx(norm * float(power_law(30).sum()), rel=1e-6)


def test_entries_at_the_end_of_the_range():
    matrix = torch.eye(3) * 3.3e38
    assert torch.allclose(polar(matrix).factor, torch.eye(3))


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("shape", [(5, 3), (1, 4), (4, 1), (1, 1)])
def test_zero_matrix(shape, precision):
    ours = polar(torch.zeros(shape), precision=precision)
    assert ours.rank == 0
    assert ours.nuclear_norm == ours.mean_singular_value == 0
    assert torch.equal(ours.factor, torch.zeros(shape))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(1, 7), (7, 1)])
def test_one_row_or_column_is_normalised(shape, route):
    vector = torch.arange(1.0, 8.0).reshape(shape)
    ours = polar(vector, route=route)
    assert torch.allclose(ours.factor, vector / vector.norm())
    assert ours.nuclear_norm == pytest.approx(float(vector.norm()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    matrix = with_spectrum(40, 30, power_law(30)).to(dtype)
    ours = polar(matrix)
    assert ours.factor.dtype == dtype
    assert torch.equal(ours.factor, polar(matrix.float()).factor.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_agrees_with_the_svd(dtype, route, shape):
    matrix = with_spectrum(*shape, power_law(min(shape))).to(dtype)
    ours = polar(matrix, route=route)
    factor, nuclear_norm, rank = reference(matrix, "full", 0)
    assert ours.rank == rank
    assert distance(ours.factor, factor) <= 1e-4 + torch.finfo(dtype).eps / 2
    assert ours.nuclear_norm == pytest.approx(nuclear_norm, rel=1e-6)


def test_numerical_support_drops_what_full_support_promotes():
    matrix = with_spectrum(40, 40, power_law(40) * (torch.arange(40) < 10)).float()
    assert polar(matrix).rank == 10
    assert polar(matrix, support="full").rank == 40
    assert polar(matrix).factor.norm() == pytest.approx(10**0.5, rel=1e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_input_is_not_modified(route):
    matrix = with_spectrum(30, 20, power_law(20)).float()
    copy = matrix.clone()
    polar(matrix, route=route)
    assert torch.equal(matrix, copy)


@pytest.mark.parametrize("norm", [1e-30, 1.0, 1e15])
def test_thin_factors_give_the_dense_result(norm):
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(60, 8, generator=generator) * norm
    right = torch.randn(8, 50, generator=generator) * norm
    dense = polar(left.double() @ right.double(), rank_tolerance=1e-6)
    thin = polar(LowRank(left, right))
    assert isinstance(thin.factor, LowRank)
    assert thin.rank == dense.rank == 8
    assert distance(thin.factor.dense(), dense.factor) <= 1e-5
    assert thin.nuclear_norm == pytest.approx(dense.nuclear_norm, rel=1e-5)


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_sums_of_thin_updates_have_the_polar_factor_of_their_rank(precision):
    """Through the factors, and expanded in float32, where rounding fills the null space."""
    sums = lora_sum(5, 90, 70, rank=3)
    exact = sums.left.double() @ sums.right.double()
    factor, nuclear_norm, rank = reference(exact, "numerical", 1e-9)
    thin, dense = polar(sums, precision=precision), polar(exact.float(), precision=precision)
    assert thin.rank == dense.rank == rank == 15
    for ours, expanded in ((thin, thin.factor.dense()), (dense, dense.factor)):
        assert distance(expanded, factor) <= 1e-4
        assert ours.nuclear_norm == pytest.approx(nuclear_norm, rel=1e-6)


@pytest.mark.parametrize("route", ["svd", "gram", "halley", "products"])
def test_thin_factors_take_the_route_asked_for(route):
    whole = with_spectrum(60, 50, geometric(8, 5))
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    thin = polar(LowRank(U[:, :8] * S[:8], Vh[:8]), route=route)
    assert thin.route == route
    assert distance(thin.factor.dense(), U[:, :8] @ Vh[:8]) <= 1e-5


def thin_factors(left: torch.dtype, right: torch.dtype) -> LowRank:
    generator = torch.Generator().manual_seed(4)
    L = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    R = torch.randn(3, 15, generator=generator, dtype=torch.float64)
    return LowRank(L.to(left), R.to(right))


def test_thin_factors_of_two_dtypes():
    mixed = thin_factors(torch.bfloat16, torch.float64)
    assert mixed.dense().dtype == mixed.dtype == torch.float64
    assert torch.equal(mixed.dense(), mixed.left.double() @ mixed.right)
    expected = reference(mixed.dense(), "numerical", 1e-9)
    ours = polar(mixed)
    assert (ours.rank, ours.factor.dtype) == (3, torch.float64)
    assert distance(ours.factor.dense(), expected[0]) <= 1e-8


@pytest.mark.parametrize(("left", "right"), [(1e-200, 1e-200), (1e-200, 1e200), (1e200, 1e-150)])
def test_thin_factors_at_the_ends_of_float64(left, right):
    plain = thin_factors(torch.float64, torch.float64)
    factor, nuclear_norm, _ = reference(plain.dense(), "numerical", 1e-9)
    ours = polar(LowRank(plain.left * left, plain.right * right))
    assert ours.rank == 3
    assert distance(ours.factor.dense(), factor) <= 1e-8
    assert ours.nuclear_norm == pytest.approx(nuclear_norm * (left * right), rel=1e-10)


def test_core_multiplies_back_to_the_product():
    thin = thin_factors(torch.float32, torch.float32)
    P, K, Q, unit = LowRank(thin.left * 1e-30, thin.right * 1e10).core()
    assert torch.allclose(P.T @ P, torch.eye(3).double(), atol=1e-12)
    assert torch.allclose(Q.T @ Q, torch.eye(3).double(), atol=1e-12)
    expected = (thin.left * 1e-30).double() @ (thin.right * 1e10).double()
    assert distance(P @ K @ Q.T * unit, expected) <= 1e-14
    zero = LowRank(torch.zeros(5, 2), torch.ones(2, 4))
    assert polar(zero).rank == 0 and not polar(zero).factor.dense().any()


@pytest.mark.parametrize(
    "spectrum",
    [
        power_law(200),
        geometric(200, 11),
        geometric(200, 3e3),
        torch.linspace(1, 0.8, 200).double(),
    ],
)
@pytest.mark.parametrize("route", ["gram", "halley"])
def test_thread_count_does_not_matter(route, spectrum):
    matrix = with_spectrum(300, 200, spectrum).float()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(polar(matrix, route=route).factor)
    finally:
        torch.set_num_threads(before)
    assert distance(*results) <= 1e-6


@settings(deadline=None, max_examples=40)
@given(
    out=st.integers(1, 24),
    inner=st.integers(1, 24),
    exponent=st.floats(0, 2),
    magnitude=st.integers(-30, 30),
    seed=st.integers(0, 2**16),
)
def test_polar_properties(out, inner, exponent, magnitude, seed):
    """Orthogonality, positivity of the Hermitian factor, nuclear norm, oddness."""
    values = power_law(min(out, inner), exponent) * 10.0**magnitude
    matrix = with_spectrum(out, inner, values, seed).float()
    ours = polar(matrix)
    assert ours.rank == min(out, inner)
    tall = ours.factor if out >= inner else ours.factor.T
    assert torch.allclose(tall.T @ tall, torch.eye(min(out, inner)), atol=1e-4)
    hermitian = ours.factor.double().T @ matrix.double() / 10.0**magnitude
    assert distance(hermitian, hermitian.T) <= 1e-4
    assert float(torch.linalg.eigvalsh(hermitian).min()) >= -1e-4
    assert ours.nuclear_norm == pytest.approx(float(values.sum()), rel=1e-5)
    assert distance(-polar(-matrix).factor, ours.factor) <= 1e-6


@pytest.mark.parametrize(
    ("shape", "device", "precision", "route", "word"),
    [
        ((64, 64), "cpu", "fast", "gram", "Gram"),
        ((768, 768), "cpu", "fast", "halley", "Halley"),
        ((4096, 2048), "cpu", "fast", "halley", "Gram eigenproblem"),
        ((64, 64), "cuda", "fast", "products", "Newton"),
        ((4096, 2048), "cpu", "exact", "svd", "SVD"),
    ],
)
def test_choice_of_route(shape, device, precision, route, word):
    assert choose_route(shape, device, precision) == route
    assert word in explain_polar(shape, device, precision)


def test_explanation_names_the_conditions():
    assert explain_polar((0, 5)) == "no polar factor"
    assert "1e-3·S₁, else float64 Gram" in explain_polar((768, 768), "cuda")
    assert explain_routes(["a", "b"], "exact") == "a; b"
    assert "thin SVD in float64 where singular values below 1e-6·S₁" in explain_routes([], "fast")
