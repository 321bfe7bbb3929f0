"""Leading triplets: every route against the float64 SVD, with and without a gap."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eutectic.linalg import leading
from eutectic.linalg.leading import (
    complement,
    explain_leading,
    leading_singular,
    leading_singular_stack,
)
from eutectic.linalg.lowrank import LowRank

from .spectra import SPECTRA, distance, geometric, lora_sum, power_law, with_spectrum


def product(triplets):
    return (triplets.U * triplets.S) @ triplets.V.T


def truncated(matrix, k, tolerance=None):
    """Textbook best rank-k approximation, without singular values up to the tolerance."""
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    if tolerance is not None:
        k = min(k, int((S > tolerance * S[0]).sum()))
    return (U[:, :k] * S[:k]) @ Vh[:k], S[:k]


@pytest.mark.parametrize("shape", [(192, 192), (96, 250), (250, 96)])
@pytest.mark.parametrize("k", [1, 3, 20, 60, 96])
@pytest.mark.parametrize(
    "spectrum", [s for s in SPECTRA if s not in ("equal", "repeated", "clustered")]
)
def test_agrees_with_the_svd(shape, k, spectrum):
    matrix = with_spectrum(*shape, SPECTRA[spectrum](min(shape))).float()
    ours = leading_singular(matrix, k, tolerance=1.3e-5)
    dense, S = truncated(matrix, k, 1.3e-5)
    assert len(ours.S) == len(S)
    assert torch.allclose(ours.S, S, rtol=1e-4, atol=0)
    assert distance(product(ours), dense) <= 1e-4


@pytest.mark.parametrize("spectrum", ["equal", "repeated", "clustered"])
@pytest.mark.parametrize("k", [2, 30, 48])
def test_without_a_gap_some_valid_answer(spectrum, k):
    """Where the cut falls inside a cluster, any choice from the cluster is right."""
    matrix = with_spectrum(96, 120, SPECTRA[spectrum](96)).float()
    ours = leading_singular(matrix, k)
    expected = torch.linalg.svdvals(matrix.double())[:k]
    assert torch.allclose(ours.S, expected, rtol=1e-5)
    assert torch.allclose(ours.U.T @ ours.U, torch.eye(k).double(), atol=1e-5)
    assert torch.allclose(ours.V.T @ ours.V, torch.eye(k).double(), atol=1e-5)
    assert torch.allclose(matrix.double() @ ours.V, ours.U * ours.S, atol=1e-5)


SIDES = st.integers(1, 24)


@settings(deadline=None, max_examples=60)
@given(spectrum=st.sampled_from(list(SPECTRA)), out=SIDES, inner=SIDES, data=st.data())
def test_the_best_approximation_of_any_spectrum_and_shape(spectrum, out, inner, data):
    """Its distance to M is that of the SVD's, gap or no gap; with a gap it is the SVD's."""
    side = min(out, inner)
    k = data.draw(st.integers(1, side))
    values, seed = SPECTRA[spectrum](side), data.draw(st.integers(0, 99))
    matrix = with_spectrum(out, inner, values, seed).float()
    ours = leading_singular(matrix, k)
    dense, S = truncated(matrix, k)
    assert torch.allclose(ours.S, S, rtol=1e-4, atol=1e-10)
    missed, least = (torch.linalg.norm(matrix.double() - d) for d in (product(ours), dense))
    assert float(missed) == pytest.approx(float(least), rel=1e-4, abs=1e-6)
    if k == side or float(values[k - 1] - values[k]) > 1e-2 * float(values[k - 1]):
        assert distance(product(ours), dense) <= 1e-4


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("shape", [(40, 40), (90, 40), (40, 90)])
@pytest.mark.parametrize("k", [5, 25, 40])
def test_condition_1e12_in_float64(shape, k, precision):
    matrix = with_spectrum(*shape, geometric(40, 1e12))
    ours = leading_singular(matrix, k, precision=precision)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(ours.S, S[:k], rtol=1e-4, atol=0)
    assert distance(ours.U @ ours.V.T, U[:, :k] @ Vh[:k]) <= 1e-4


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(80, 100), (100, 80), (80, 80)])
@pytest.mark.parametrize("k", [1, 9, 80])
def test_half_precision(dtype, shape, k):
    matrix = with_spectrum(*shape, power_law(80)).to(dtype)
    ours = leading_singular(matrix, k)
    dense, S = truncated(matrix, k)
    assert ours.S.dtype == ours.U.dtype == torch.float64
    assert torch.allclose(ours.S, S, rtol=1e-5)
    assert distance(product(ours), dense) <= 1e-4


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_keeps_what_lies_far_below_the_largest_entry(dtype):
    matrix = torch.zeros(30, 20, dtype=dtype)
    matrix[0, 0] = 60000
    matrix[1:, 1:] = with_spectrum(29, 19, power_law(19)).to(dtype)
    ours = leading_singular(matrix, 3)
    dense, S = truncated(matrix, 3)
    assert torch.allclose(ours.S, S, rtol=1e-5)
    assert distance(product(ours)[1:, 1:], dense[1:, 1:]) <= 1e-4
    (stacked,) = leading_singular_stack([matrix], 3, orthogonal_to=torch.eye(30)[:, 29:])
    assert torch.allclose(stacked.S, truncated(matrix[:29], 3)[1], rtol=1e-5)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("shape", [(1, 90), (90, 1), (1, 1)])
def test_one_row_or_column(shape, precision, dtype):
    matrix = with_spectrum(*shape, power_law(1)).to(dtype)
    ours = leading_singular(matrix, 4, precision=precision)
    norm = torch.linalg.norm(matrix.double())
    assert ours.S.shape == (1,) and float(ours.S) == pytest.approx(float(norm), rel=1e-6)
    assert distance(product(ours), matrix) <= 1e-6


@pytest.mark.parametrize("tolerance", [None, 1e-5])
def test_sums_of_thin_updates(tolerance):
    """The sum of LoRA updates, through its factors and expanded, against the SVD of its rank."""
    sums = lora_sum(5, 60, 50, rank=3)
    exact = sums.left.double() @ sums.right.double()
    for matrix in (sums, exact.float()):
        ours = leading_singular(matrix, 15, tolerance=tolerance)
        assert len(ours.S) == 15
        assert torch.allclose(ours.S, truncated(exact, 15)[1], rtol=1e-4)
        U, _, Vh = torch.linalg.svd(exact, full_matrices=False)
        assert distance(ours.U @ ours.V.T, U[:, :15] @ Vh[:15]) <= 1e-4


@pytest.mark.parametrize("norm", [1e-30, 1e30])
def test_huge_and_tiny_norms(norm):
    matrix = with_spectrum(100, 80, power_law(80))
    ours = leading_singular((matrix * norm).float(), 9)
    assert distance(product(ours) / norm, truncated(matrix, 9)[0]) <= 1e-5


def test_full_rank_request_of_a_deficient_matrix_keeps_orthonormal_vectors():
    matrix = with_spectrum(20, 30, SPECTRA["deficient"](20)).float()
    ours = leading_singular(matrix, 20)
    assert ours.U.shape == (20, 20)
    assert torch.allclose(ours.U.T @ ours.U, torch.eye(20).double(), atol=1e-6)
    assert torch.allclose(ours.V.T @ ours.V, torch.eye(20).double(), atol=1e-6)


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_zero_matrix_and_zero_triplets(precision):
    zero = torch.zeros(6, 4)
    assert leading_singular(zero, 3, tolerance=1e-6, precision=precision).U.shape == (6, 0)
    assert torch.equal(leading_singular(zero, 3, precision=precision).S, torch.zeros(3).double())
    assert leading_singular(torch.eye(4), 0, precision=precision).V.shape == (4, 0)


@pytest.fixture
def taken(monkeypatch):
    """The routes before the float64 eigenproblem that gave a result, in order."""
    names = []

    def watch(name):
        kernel = getattr(leading, f"_{name}")

        def watched(*arguments):
            found = kernel(*arguments)
            names.extend([name] if found is not None else [])
            return found

        monkeypatch.setattr(leading, f"_{name}", watched)

    watch("krylov")
    watch("corrected")
    return names


def test_same_seed_same_bits_any_seed_same_answer(taken):
    matrix = with_spectrum(512, 520, power_law(512)).float()
    first, again, other = (leading_singular(matrix, 8, seed=s) for s in (1, 1, 2))
    assert taken == ["krylov"] * 3
    assert torch.equal(first.U, again.U) and torch.equal(first.V, again.V)
    assert not torch.equal(first.U, other.U)
    assert distance(product(other), product(first)) <= 1e-6
    assert distance(product(first), truncated(matrix, 8)[0]) <= 1e-5


@pytest.mark.parametrize(
    ("k", "route"),
    [(4, ["krylov"]), (20, ["corrected"]), (150, [])],
    ids=["krylov", "corr", "full"],
)
def test_thread_count_does_not_matter(k, route, taken):
    matrix = with_spectrum(280, 256, power_law(256)).float()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(leading_singular(matrix, k))
    finally:
        torch.set_num_threads(before)
    assert taken == route * 2
    one, two = results
    assert torch.allclose(one.S, two.S, rtol=1e-9)
    assert distance(product(one), product(two)) <= 1e-6
    assert distance(one.U @ one.V.T, two.U @ two.V.T) <= 1e-6


def test_thin_factors_give_the_dense_result():
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(70, 9, generator=generator)
    right = torch.randn(9, 50, generator=generator)
    ours = leading_singular(LowRank(left, right), 4)
    assert distance(product(ours), truncated(left.double() @ right.double(), 4)[0]) <= 1e-6


def test_thin_factors_at_the_ends_of_float64():
    left = with_spectrum(30, 4, power_law(4))
    right = with_spectrum(4, 20, power_law(4), seed=1)
    ours = leading_singular(LowRank(left * 1e-200, right * 1e180), 2, tolerance=1e-9)
    assert distance(product(ours) * 1e20, truncated(left @ right, 2)[0]) <= 1e-9
    below = leading_singular(LowRank(left * 1e-200, right * 1e-200), 2, tolerance=1e-9)
    assert below.U.shape == (30, 2)  # the values themselves are beyond float64
    assert distance(below.U @ below.V.T, ours.U @ ours.V.T) <= 1e-9


@pytest.mark.parametrize("c", [None, 6, 50])
def test_a_stack_takes_thin_factors_beside_matrices(c):
    generator = torch.Generator().manual_seed(6)
    thin = [
        LowRank(
            torch.randn(80, 5, generator=generator), torch.randn(5, 60, generator=generator) * norm
        )
        for norm in (1e-30, 1.0)
    ]
    P = None if c is None else torch.linalg.qr(torch.randn(80, c, generator=generator)).Q
    how = {"orthogonal_to": P, "tolerance": 1e-5}
    from_factors = leading_singular_stack(thin, 3, **how)
    from_matrices = leading_singular_stack([m.dense() for m in thin], 3, **how)
    for ours, theirs in zip(from_factors, from_matrices, strict=True):
        assert len(ours.S) == 3
        assert distance(product(ours), product(theirs)) <= 1e-5
    mixed = leading_singular_stack([thin[0], thin[1].dense()], 3, **how)
    assert torch.equal(mixed[0].U, from_factors[0].U)
    assert torch.equal(mixed[1].U, from_matrices[1].U)


@pytest.mark.parametrize("c", [4, 30])
def test_thin_factors_inside_the_subspace_leave_nothing(c):
    P = torch.linalg.qr(torch.randn(40, c, generator=torch.Generator().manual_seed(1))).Q
    inside = LowRank(P @ with_spectrum(c, 3, power_law(3)).float(), torch.eye(3, 50))
    (ours,) = leading_singular_stack([inside], 3, orthogonal_to=P, tolerance=1e-5)
    assert len(ours.S) == 0


@pytest.mark.parametrize("shape", [(80, 100), (240, 80)])
@pytest.mark.parametrize("c", [10, 70])
def test_stack_orthogonal_to_a_subspace(shape, c):
    generator = torch.Generator().manual_seed(5)
    matrices = torch.randn(3, *shape, generator=generator)
    P = torch.linalg.qr(torch.randn(shape[0], c, generator=generator)).Q
    ours = leading_singular_stack(matrices, 5, orthogonal_to=P, tolerance=1e-5)
    for matrix, triplets in zip(matrices.double(), ours, strict=True):
        rest = matrix - P.double() @ (P.double().T @ matrix)
        assert distance(product(triplets), truncated(rest, 5)[0]) <= 1e-5
        assert float((P.double().T @ triplets.U).abs().max()) <= 1e-6


@pytest.mark.parametrize("c", [None, 10, 60])
@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize(
    ("dtype", "norm"),
    [(torch.float32, 1e-30), (torch.float32, 1e30), *((half, 1.0) for half in HALVES)],
)
def test_stack_of_any_norm_and_dtype(dtype, norm, precision, c):
    matrices = [with_spectrum(80, 60, power_law(60), seed).mul(norm).to(dtype) for seed in (1, 2)]
    generator = torch.Generator().manual_seed(5)
    P = torch.linalg.qr(torch.randn(80, c or 1, generator=generator, dtype=torch.float64)).Q
    P = P if c is not None else None
    how = {"tolerance": 1e-5, "precision": precision}
    ours = leading_singular_stack(matrices, 5, orthogonal_to=P, **how)
    for matrix, triplets in zip(matrices, ours, strict=True):
        rest = matrix.double() / norm
        rest = rest if P is None else rest - P @ (P.T @ rest)
        assert len(triplets.S) == 5
        assert distance(product(triplets) / norm, truncated(rest, 5)[0]) <= 1e-4


@pytest.mark.parametrize("c", [4, 30])
def test_stack_takes_no_direction_from_the_rounding_of_a_projection(c):
    P = torch.linalg.qr(torch.randn(40, c, generator=torch.Generator().manual_seed(1))).Q
    inside = P @ with_spectrum(c, 50, power_law(c)).float()
    (ours,) = leading_singular_stack([inside], 3, orthogonal_to=P, tolerance=1e-5)
    assert len(ours.S) == 0


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 40), data=st.data(), seed=st.integers(0, 2**16))
def test_complement(n, data, seed):
    c = data.draw(st.integers(0, n))
    full = torch.linalg.qr(
        torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).Q
    joined = torch.cat([full[:, :c], complement(full[:, :c], seed)], 1)
    assert torch.allclose(joined.T @ joined, torch.eye(n).double(), atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "k", "precision", "word"),
    [
        ((768, 768), 8, "fast", "Krylov"),
        ((768, 768), 96, "fast", "corrected"),
        ((768, 768), 500, "fast", "float64 eigenproblem"),
        ((768, 768), 8, "exact", "SVD"),
    ],
)
def test_explanation(shape, k, precision, word):
    assert word in explain_leading(shape, k, precision)


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_no_triplets_are_no_work(precision, monkeypatch):
    assert explain_leading((768, 768), 0, precision) == "no leading triplets"
    for name in ("thin_svd", "gram"):
        monkeypatch.setattr(leading, name, lambda *_: pytest.fail("decomposed for no triplet"))
    P = torch.eye(6)[:, :4]
    for found in (
        leading_singular(torch.eye(6, 5), 0, precision=precision),
        *leading_singular_stack([torch.eye(6, 5)], 0, orthogonal_to=P, precision=precision),
    ):
        assert (found.U.shape, found.S.shape, found.V.shape) == ((6, 0), (0,), (5, 0))
