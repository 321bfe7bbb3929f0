"""Isotropic merging: parity with the formula written out, flat spectra, and rank deficiency."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eutectic.errors import MethodError
from eutectic.linalg.lowrank import LowRankStack
from eutectic.methods import Context, get_method, merge_matrices
from eutectic.methods.isotropic import split_spectrum
from eutectic.types import LayerStatistics


def random_deltas(experts: int, out: int, inner: int, rank: int | None = None, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(experts, out, inner, generator=generator)
    left = torch.randn(experts, out, rank, generator=generator)
    return left @ torch.randn(experts, rank, inner, generator=generator)


def textbook_iso_c(deltas: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(deltas.double().sum(0), full_matrices=False)
    return S.mean() * U @ Vh


def textbook_iso_cts(deltas: Tensor, fraction: float) -> Tensor:
    deltas = deltas.double()
    r, T = min(deltas.shape[1:]), len(deltas)
    k = min(round((r - int(r * fraction)) / T), r // T)
    c = r - k * T
    U, S, Vh = torch.linalg.svd(deltas.sum(0), full_matrices=False)
    lefts, values, rights = [], [], []
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta - U[:, :c] @ U[:, :c].T @ delta, full_matrices=False)
        lefts.append(u[:, :k])
        values.append(s[:k])
        rights.append(vh[:k].T)
    polars = []
    for blocks in ([*lefts, U[:, :c]], [*rights, Vh[:c].T]):
        u, _, vh = torch.linalg.svd(torch.cat(blocks, 1), full_matrices=False)
        polars.append(u @ vh)
    return torch.cat([*values, S[:c]]).mean() * polars[0] @ polars[1].T


def error(ours: Tensor, reference: Tensor) -> float:
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


SHAPES = [(40, 40), (24, 70), (70, 24), (1, 9), (9, 1)]


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("support", ["numerical", "full"])
@pytest.mark.parametrize("experts", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_is_its_formula(shape, experts, support, precision):
    deltas = random_deltas(experts, *shape)
    ours = merge_matrices("iso_c", deltas, support=support, precision=precision)
    assert error(ours, textbook_iso_c(deltas)) <= 1e-5


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("support", ["numerical", "full"])
@pytest.mark.parametrize("fraction", [0.2, 0.8, 1.0])
@pytest.mark.parametrize("experts", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_iso_cts_is_its_formula(shape, experts, fraction, support, precision):
    deltas = random_deltas(experts, *shape)
    ours = merge_matrices(
        "iso_cts", deltas, common_fraction=fraction, support=support, precision=precision
    )
    assert error(ours, textbook_iso_cts(deltas, fraction)) <= 1e-4


@pytest.mark.parametrize("support", ["numerical", "full"])
def test_iso_cts_without_task_directions_is_iso_c(support):
    deltas = random_deltas(4, 30, 20)
    cts = merge_matrices("iso_cts", deltas, common_fraction=1.0, support=support)
    assert error(cts, merge_matrices("iso_c", deltas, support=support)) <= 1e-5


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
@pytest.mark.parametrize("rank", [None, 2])
def test_spectrum_is_flat(method, rank):
    merged = merge_matrices(method, random_deltas(3, 30, 20, rank))
    S = torch.linalg.svdvals(merged.double())
    kept = S[S > 1e-4 * S[0]]
    assert len(kept) == (20 if rank is None else 6)
    assert float(kept.min() / kept.max()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_numerical_support_ignores_a_border_of_zeros(method):
    """What makes thin factors and expanded adapters give one result."""
    core = random_deltas(3, 20, 16)
    bordered = torch.zeros(3, 50, 60)
    bordered[:, 5:25, 7:23] = core
    merged = merge_matrices(method, bordered)
    assert error(merged[5:25, 7:23], merge_matrices(method, core)) <= 1e-5
    assert error(merged.norm(), merged[5:25, 7:23].norm()) <= 1e-6


def test_iso_c_keeps_the_nuclear_norm_of_a_low_rank_sum():
    deltas = random_deltas(6, 48, 48, rank=2)
    merged = merge_matrices("iso_c", deltas)
    expected = float(torch.linalg.svdvals(deltas.sum(0).double()).sum())
    assert float(torch.linalg.svdvals(merged.double()).sum()) == pytest.approx(expected, rel=1e-5)


def test_rank_tolerance_is_relative_to_the_largest_singular_value():
    delta = torch.diag(torch.tensor([4.0, 2.0, 0.3]))[None] * 1e-20
    merged = merge_matrices("iso_c", delta, rank_tolerance=0.1)
    assert torch.allclose(merged / 1e-20, torch.diag(torch.tensor([3.0, 3.0, 0.0])), atol=1e-5)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_experts_that_cancel_give_zero(method):
    delta = random_deltas(1, 12, 9)[0]
    assert torch.equal(merge_matrices(method, [delta, -delta]), torch.zeros(12, 9))


def test_iso_cts_with_one_expert_repeated():
    """Task directions inside the common subspace are rounding; shared ones count once."""
    delta = random_deltas(1, 30, 20)[0]
    merged = merge_matrices("iso_cts", torch.stack([delta] * 3))
    S = torch.linalg.svdvals(merged.double())
    kept = S[S > 1e-4 * S[0]]
    assert len(kept) < 20
    assert float(kept.min() / kept.max()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_weights_scale_the_deltas(method):
    deltas = random_deltas(3, 12, 9)
    weighted = merge_matrices(method, deltas, weights=[0.5, 2.0, 1.0])
    scaled = deltas * torch.tensor([0.5, 2.0, 1.0]).view(3, 1, 1)
    assert error(weighted, merge_matrices(method, scaled)) <= 1e-6


@settings(deadline=None)
@given(rank=st.integers(0, 200), fraction=st.floats(0.01, 1), experts=st.integers(1, 40))
def test_split_fills_the_rank(rank, fraction, experts):
    c, k = split_spectrum(rank, fraction, experts)
    assert c >= 0 and k >= 0
    assert c + k * experts == rank


def test_default_scales():
    assert [get_method("iso_c").default_scale(n) for n in (8, 14, 20)] == [1.3, 1.0, 0.9]
    assert [get_method("iso_cts").default_scale(n) for n in (8, 14, 20)] == [1.5, 1.2, 1.1]


@pytest.mark.parametrize("bad", [{"common_fraction": 0.0}, {"support": "some"}, {"rank": 3}])
def test_bad_parameters(bad):
    with pytest.raises(MethodError, match=next(iter(bad))):
        merge_matrices("iso_cts", random_deltas(2, 4, 4), **bad)


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "iso_a", "tsv_m"])
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_plan_explains_the_route(method, precision):
    entry = get_method(method)
    assert entry.explain is not None
    sentence = entry.explain((8, 768, 3072), entry.parse({}), precision)
    assert ("SVD in float64 (exact" in sentence) == (precision == "exact")
    assert "768" in sentence or precision == "exact"


def explained(method: str, shape=(8, 768, 3072), precision="fast", **options) -> str:
    entry = get_method(method)
    assert entry.explain is not None
    return entry.explain(shape, entry.parse(options), precision)


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_plan_names_the_eigenproblems_of_iso_a(precision):
    sentence = explained("iso_a", precision=precision, metric_rank="full")
    assert "9 eigenproblems of side 3072, in float64" in sentence
    assert "polar factor" in sentence
    few = explained("iso_a", precision=precision, metric_rank=32)
    assert ("32 of 3072 directions in a Krylov space" in few) == (precision == "fast")
    assert ("degree 2 and 6" in few) == (precision == "fast")
    small = explained("iso_a", precision=precision, metric_rank=1000)
    assert "side 3072" in small and ("in float32 where" in small) == (precision == "fast")


def test_plan_counts_the_parts_of_iso_cts():
    """r = 768: 768 − int(0.8·768) = 154 of their own, 19 for each of 8 experts."""
    sentence = explained("iso_cts")
    assert "sum: 768 of 768 leading triplets" in sentence
    assert "each expert: 19 of 768 leading triplets" in sentence
    assert sentence.count("polar factor") == 2 and "side 152" in sentence
    full = explained("iso_cts", support="full")
    assert "sum: 616 of 768 leading triplets" in full


def test_plan_leaves_out_triplets_that_nobody_asks_for():
    sentence = explained("iso_cts", common_fraction=1)
    assert "each expert" not in sentence and sentence.count("polar factor") == 1
    few = explained("iso_cts", common_fraction=0.01, shape=(2, 4, 4))
    assert "sum: 4 of 4" in few and "each expert: 2 of 4" in few
    assert "sum" not in explained("iso_cts", common_fraction=0.01, shape=(2, 4, 4), support="full")


@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "iso_a", "tsv_m"])
def test_plan_names_what_goes_to_the_svd(method):
    sentence = explained(method)
    assert sentence.count("thin SVD in float64 where singular values below 1e-6·S₁") == 1
    for condition in ("full support", "tolerance", "float64 input"):
        assert condition in sentence
    assert "1e-6" not in explained(method, precision="exact")


def statistics(experts: int, inner: int, gram=None) -> list[LayerStatistics]:
    generator = torch.Generator().manual_seed(9)
    found = []
    for _ in range(experts):
        X = torch.randn(50, inner, generator=generator) * torch.linspace(0.1, 2, inner)
        found.append(LayerStatistics(gram=X.T @ X if gram is None else gram, count=50))
    return found


def test_iso_a_is_its_formula():
    deltas, entries, ridge = random_deltas(3, 14, 10), statistics(3, 10), 0.1
    moments = [s.gram.double() / s.count for s in entries]
    moments = [C + ridge * C.trace() / 10 * torch.eye(10) for C in moments]

    def power(C, p):
        values, vectors = torch.linalg.eigh(C)
        return vectors @ torch.diag(values**p) @ vectors.T

    total = sum(d.double() @ power(C, 0.5) for d, C in zip(deltas, moments, strict=True))
    flat = textbook_iso_c(total[None])
    ours = merge_matrices("iso_a", deltas, statistics=entries, ridge=ridge)
    assert error(ours, flat @ power(sum(moments) / 3, -0.5)) <= 1e-5


@pytest.mark.parametrize("gram", [torch.eye(10) * 50, torch.zeros(10, 10)])
def test_iso_a_in_a_metric_without_preference_is_iso_c(gram):
    deltas = random_deltas(3, 14, 10)
    ours = merge_matrices("iso_a", deltas, statistics=statistics(3, 10, gram))
    assert error(ours, merge_matrices("iso_c", deltas)) <= 1e-5


def test_iso_a_needs_statistics():
    with pytest.raises(MethodError, match="gram"):
        merge_matrices("iso_a", random_deltas(2, 4, 4))


def test_iso_c_keeps_factors_of_nearly_full_rank_thin():
    """The core is in float64: nearer to the exact result than the expanded float32 deltas are."""
    generator = torch.Generator().manual_seed(3)
    left = tuple(torch.randn(20, 8, generator=generator) for _ in range(2))
    right = tuple(torch.randn(8, 48, generator=generator) for _ in range(2))
    stack, method = LowRankStack(left, right), get_method("iso_c")
    assert method.thin is not None
    thin = method.thin(stack, method.parse({}), Context(weights=(1.0, 1.0), experts=("a", "b")))
    assert thin is not None and thin.left.shape == (20, 16)
    U, S, Vh = torch.linalg.svd(
        sum(a.double() @ b.double() for a, b in zip(left, right, strict=True))
    )
    exact = S[:16].mean() * U[:, :16] @ Vh[:16]
    assert float((thin.dense().double() - exact).norm() / exact.norm()) < 1e-6
    wide = LowRankStack((*left, left[0][:, :3]), (*right, right[0][:3]))  # 19 of 20
    context = Context(weights=(1.0,) * 3, experts=("a", "b", "c"))
    assert method.thin(wide, method.parse({}), context) is None
