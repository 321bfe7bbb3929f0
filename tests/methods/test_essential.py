"""ESM: a naive transcription by SVDs of activations, the flat spectrum, and every short supply."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eutectic.errors import MethodError, NumericalError
from eutectic.execution.merging import layer_factors
from eutectic.linalg.essential import essential_subspace
from eutectic.methods import get_method, merge_matrices
from eutectic.types import LayerStatistics


def problem(
    out: int, inputs: int, experts: int, tokens: int = 200, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    deltas = torch.randn(experts, out, inputs, generator=g)
    mixing = torch.randn(experts, inputs, inputs, generator=g)
    X = torch.randn(experts, tokens, inputs, generator=g) @ mixing + 0.5
    return deltas, X


def grams(X: torch.Tensor) -> list[LayerStatistics]:
    return [LayerStatistics(gram=x.T @ x, count=len(x)) for x in X.double()]


def by_activations(
    deltas: torch.Tensor,
    X: torch.Tensor,
    task: float = 2,
    eigenvalue: float = 0.15,
    column: float = 2,
    factor: float = 2,
) -> torch.Tensor:
    """The formula, step by step, by SVDs of X Δᵀ."""
    deltas, X = deltas.double(), X.double()
    experts, out, _ = deltas.shape
    k = max(1, int(out / experts))
    norms = [torch.linalg.matrix_norm(d) for d in deltas]
    left, right = [], []
    for t in range(experts):
        _, S, Vh = torch.linalg.svd(X[t] @ deltas[t].T, full_matrices=False)
        E, values = Vh.T[:, :k], S[:k] ** 2
        C = E.T @ deltas[t] * (norms[t] / (sum(norms) / experts)) ** task
        s = (values / values.mean()) ** eigenvalue
        s = s / s.mean()
        left.append(E @ s.diag())
        right.append(s.diag() @ C)
    E, C = torch.cat(left, 1), torch.cat(right, 0)
    lengths = torch.stack([c.norm() for c in C.T])
    C = C @ ((lengths / lengths.mean()) ** column).diag()
    flat = []
    for M in (E, C):
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        flat.append(S.mean() * U @ Vh)
    return factor * flat[0] @ flat[1]


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


@settings(deadline=None, max_examples=25)
@given(
    out=st.integers(4, 20),
    inputs=st.integers(4, 20),
    experts=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_grams_give_what_activations_give(out: int, inputs: int, experts: int, seed: int):
    deltas, X = problem(out, inputs, experts, seed=seed)
    k = max(1, out // experts)
    if k > inputs:  # the activations' SVD fills up with arbitrary directions there
        return
    merged = merge_matrices("esm", deltas.double(), statistics=grams(X))
    assert relative_error(merged, by_activations(deltas, X)) < 1e-6


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_every_way_of_storing_the_gram_spans_the_same_directions(shape: tuple[int, int]):
    deltas, X = problem(*shape, experts=1, tokens=60)
    delta, x = deltas[0].double(), X[0].double()
    _, S, Vh = torch.linalg.svd(x @ delta.T, full_matrices=False)
    diagonal = torch.full((shape[1],), 0.25, dtype=torch.float64)
    padded = torch.cat([x, 0.5 * torch.eye(shape[1], dtype=torch.float64)])
    _, _, padded_Vh = torch.linalg.svd(padded @ delta.T, full_matrices=False)
    forms = {
        "gram": (LayerStatistics(gram=x.T @ x, count=60), Vh),
        "factor": (LayerStatistics(gram_factor=x, count=60), Vh),
        "short factor": (LayerStatistics(gram_factor=torch.linalg.qr(x).R, count=60), Vh),
        "diagonal": (LayerStatistics(gram_factor=x, gram_diagonal=diagonal, count=60), padded_Vh),
    }
    for name, (statistics, expected) in forms.items():
        found = essential_subspace(delta, statistics, 5)
        overlap = torch.linalg.svdvals(expected[:5] @ found.directions)
        assert float((1 - overlap).abs().max()) < 1e-9, name
    values = essential_subspace(delta, forms["gram"][0], 5).eigenvalues
    torch.testing.assert_close(values, S[:5] ** 2)


def test_few_tokens_use_the_smallest_eigenproblem_and_agree():
    deltas, X = problem(30, 25, experts=1, tokens=7)
    x, delta = X[0].double(), deltas[0].double()
    from_factor = essential_subspace(delta, LayerStatistics(gram_factor=x, count=7), 30)
    from_gram = essential_subspace(delta, LayerStatistics(gram=(x.T @ x), count=7), 30)
    assert from_factor.directions.shape == from_gram.directions.shape == (30, 7)
    identity = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(from_factor.directions.T @ from_factor.directions, identity)
    overlap = torch.linalg.svdvals(from_factor.directions.T @ from_gram.directions)
    torch.testing.assert_close(overlap, torch.ones_like(overlap))


def test_rounding_of_a_float32_gram_is_not_taken_for_directions():
    deltas, X = problem(40, 40, experts=1, tokens=12)
    gram = X[0].T @ X[0]
    found = essential_subspace(deltas[0], LayerStatistics(gram=gram), 40)  # no count to go by
    assert found.directions.shape[1] == 12


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (20, 20)])
@pytest.mark.parametrize("preset", ["vit", "roberta", None])
def test_the_merged_delta_has_a_flat_spectrum(shape: tuple[int, int], preset: str | None):
    deltas, X = problem(*shape, experts=4)
    merged = merge_matrices("esm", deltas, statistics=grams(X), preset=preset)
    S = torch.linalg.svdvals(merged.double())
    torch.testing.assert_close(S, S.mean().expand_as(S), rtol=1e-4, atol=0)


def test_presets_are_the_published_exponents_and_explicit_values_win():
    deltas, X = problem(12, 15, experts=3)
    run = lambda **p: merge_matrices("esm", deltas.double(), statistics=grams(X), **p)  # noqa: E731
    expected = by_activations(deltas, X, task=0, column=0, factor=1)
    assert relative_error(run(preset="roberta"), expected) < 1e-8
    plain = by_activations(deltas, X, task=0, eigenvalue=0, column=0, factor=1)
    assert relative_error(run(preset=None), plain) < 1e-8
    assert relative_error(run(preset="none"), plain) < 1e-8  # as a recipe and an option write it
    mixed = by_activations(deltas, X, task=1, eigenvalue=0.15, column=0.5, factor=3)
    chosen = run(preset="vit", task_power=1, column_power=0.5, factor=3)
    assert relative_error(chosen, mixed) < 1e-8
    assert relative_error(run(), run(preset="vit")) == 0


def test_weights_scale_the_deltas():
    deltas, X = problem(12, 15, experts=2)
    weighted = merge_matrices("esm", deltas, statistics=grams(X), weights=[0.5, 2.0])
    scaled = deltas * torch.tensor([0.5, 2.0]).view(2, 1, 1)
    assert relative_error(weighted, merge_matrices("esm", scaled, statistics=grams(X))) < 1e-6


def test_the_scale_of_a_gram_does_not_matter():
    deltas, X = problem(12, 15, experts=2)
    large = [LayerStatistics(gram=1e6 * s.gram, count=s.count) for s in grams(X)]
    once = merge_matrices("esm", deltas, statistics=grams(X))
    assert relative_error(merge_matrices("esm", deltas, statistics=large), once) < 1e-6


def test_one_expert_is_flattened():
    deltas, X = problem(10, 14, experts=1)
    merged = merge_matrices("esm", deltas, statistics=grams(X), preset=None)
    U, S, Vh = torch.linalg.svd(deltas[0].double(), full_matrices=False)
    assert relative_error(merged, S.mean() * U @ Vh) < 1e-6


def test_too_few_tokens_are_said_and_promote_nothing_arbitrary():
    deltas, X = problem(20, 24, experts=2)
    few = [*grams(X[:1, :3]), *grams(X[1:])]
    merged = merge_matrices("esm", deltas, statistics=few, full_output=True)
    assert merged.record == {"rank": 10, "directions": [3, 10], "short": ["0"]}
    assert int(torch.linalg.matrix_rank(merged.delta, rtol=1e-4)) == 13


def test_low_rank_deltas_promote_nothing_arbitrary():
    deltas, X = problem(20, 24, experts=2)
    low = torch.stack([d[:, :2] @ d[:2] for d in deltas])
    merged = merge_matrices("esm", low, statistics=grams(X), full_output=True)
    assert merged.record["directions"] == [2, 2]
    S = torch.linalg.svdvals(merged.delta)
    assert float(S[4] / S[3]) < 1e-5


def test_copies_of_one_expert_do_not_promote_rounding():
    deltas, X = problem(12, 15, experts=1)
    twice = merge_matrices(
        "esm", deltas.expand(2, -1, -1), statistics=grams(X) * 2, full_output=True
    )
    assert int(torch.linalg.matrix_rank(twice.delta, rtol=1e-4)) == 6


def test_zero_deltas_and_zero_grams_give_zero_or_nothing():
    deltas, X = problem(12, 15, experts=3)
    zero = merge_matrices("esm", torch.zeros_like(deltas), statistics=grams(X))
    assert torch.equal(zero, torch.zeros(12, 15))
    silent = LayerStatistics(gram=torch.zeros(15, 15), count=0)
    merged = merge_matrices("esm", deltas, statistics=[silent, *grams(X)[1:]], full_output=True)
    assert merged.record["directions"] == [0, 4, 4]
    assert merged.record["short"] == ["0"]
    assert bool(torch.isfinite(merged.delta).all())


def test_grams_that_are_all_zero_leave_the_matrix_to_tsv_m():
    deltas, _ = problem(12, 15, experts=3)
    silent = [LayerStatistics(gram=torch.zeros(15, 15), count=4)] * 3
    merged = merge_matrices("esm", deltas, statistics=silent, full_output=True)
    assert merged.record["rest"] == "tsv_m" and "no direction" in merged.record["reason"]
    assert torch.equal(merged.delta, merge_matrices("tsv_m", deltas))


def test_more_experts_than_outputs_keep_one_direction_each():
    deltas, X = problem(3, 8, experts=5)
    merged = merge_matrices("esm", deltas, statistics=grams(X), full_output=True)
    assert merged.record == {"rank": 1, "directions": [1] * 5}


def test_a_gram_of_another_width_is_refused():
    deltas, X = problem(6, 8, experts=2)
    with pytest.raises(MethodError, match=r"attn\.weight, expert 'b': gram has .*9, 9.* \[8, 8\]"):
        merge_matrices(
            "esm",
            deltas,
            statistics=[grams(X)[0], LayerStatistics(gram=torch.eye(9))],
            experts=["a", "b"],
            tensor="attn.weight",
        )


def test_a_gram_that_is_not_finite_is_refused():
    deltas, X = problem(6, 8, experts=1)
    with pytest.raises(NumericalError, match="NaN or Inf"):
        merge_matrices("esm", deltas, statistics=[LayerStatistics(gram=torch.eye(8) / 0.0)])


def test_a_missing_gram_asks_for_statistics():
    deltas, X = problem(6, 8, experts=2)
    with pytest.raises(MethodError, match="needs statistics with 'gram'"):
        merge_matrices("esm", deltas, statistics=[grams(X)[0], None])


def test_layer_scaling_compares_like_layers_only():
    entry = get_method("esm")
    norms = {
        "h.0.attn.weight": 1.0,
        "h.1.attn.weight": 3.0,
        "h.0.fc.weight": 10.0,
        "h.1.fc.weight": 10.0,
        "h.2.fc.weight": 40.0,
        "proj.weight": 7.0,
    }
    expected = {
        "h.0.attn.weight": (1 / 2) ** 2,
        "h.1.attn.weight": (3 / 2) ** 2,
        "h.0.fc.weight": (10 / 20) ** 2,
        "h.1.fc.weight": (10 / 20) ** 2,
        "h.2.fc.weight": (40 / 20) ** 2,
        "proj.weight": 1.0,
    }
    assert layer_factors(entry, norms, entry.parse({})) == pytest.approx(expected)
    off = layer_factors(entry, norms, entry.parse({"layer_power": 0}))
    assert off == pytest.approx(dict.fromkeys(norms, 1.0))
    assert layer_factors(entry, {"h.0.w": 0.0}, entry.parse({})) == {"h.0.w": 1.0}


def test_the_plan_says_which_eigenproblems_are_solved():
    entry = get_method("esm")
    assert entry.explain is not None
    sentence = entry.explain((8, 3072, 768), entry.parse({}), "fast")
    assert "384 of 3072" in sentence and "768×768" in sentence
