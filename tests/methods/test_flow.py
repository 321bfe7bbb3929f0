"""Guards the filtered matching system: an integrated flow, MaTS' solution, WUDI's loss."""

from __future__ import annotations

import pytest
import torch

from eutectic.errors import MethodError
from eutectic.methods import merge_matrices
from eutectic.types import LayerStatistics

from .matching_cases import EXPERTS, IN, OUT, close, collect, converged, randn

STATISTICS = collect()
DELTAS = randn(EXPERTS, OUT, IN).double()


def system(gram="inputs", equal=False):
    total = torch.zeros(IN, IN, dtype=torch.float64)
    right = torch.zeros(OUT, IN, dtype=torch.float64)
    for delta, entry in zip(DELTAS, STATISTICS, strict=True):
        rows = delta
        if gram == "task_trimmed":
            ranked = delta.abs().flatten().sort(descending=True).values
            rows = torch.where(delta.abs() >= ranked[delta.numel() // 2 - 1], delta, 0)
        if gram == "task_centred":
            rows = torch.stack([row - delta.mean(0) for row in delta])
        A = entry.gram.double() / entry.count if gram == "inputs" else rows.T @ rows
        A = A / A.trace() if equal else A
        total += A
        right += delta @ A
    return total, right


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("gram", ["inputs", "task", "task_trimmed", "task_centred"])
def test_it_is_the_flow_integrated_in_small_steps(gram, equal):
    total, right = system(gram, equal)
    unit = float(torch.linalg.eigvalsh(total).mean())
    x, steps = 0.3 * DELTAS.sum(0), 4000
    for _ in range(steps):  # the midpoint rule: an error of the second order
        half = x + (right - x @ total) * (1.5 / unit / steps / 2)
        x = x + (right - half @ total) * (1.5 / unit / steps)
    found = merge_matrices("flow", DELTAS, statistics=STATISTICS, tau=1.5, gram=gram, equal=equal)
    assert float((found - x).norm() / x.norm()) < 1e-6


def test_it_goes_from_the_guess_to_the_solution():
    def run(**options):
        return merge_matrices("flow", DELTAS, statistics=STATISTICS, **options)

    close(run(tau=1e-9), 0.3 * DELTAS.sum(0), 1e-7)
    close(run(tau=1e9), run(filter="solution"), 1e-9)
    close(run(filter="solution"), converged(DELTAS, STATISTICS), 1e-4)
    close(run(tau=1e-9, init="iso_c", init_scale=1.0), merge_matrices("iso_c", DELTAS), 1e-7)
    assert not run(tau=1e-12, init="zero").abs().max() > 1e-6
    apart = [float((run(tau=tau) - run(filter="solution")).norm()) for tau in (0.1, 1, 10)]
    assert apart == sorted(apart, reverse=True)


def test_the_cut_solves_on_leading_eigenvectors_alone():
    total, right = system()
    values, basis = torch.linalg.eigh(total)
    ratio = round(float(values.sum() ** 2 / values.square().sum()))
    start = 0.3 * DELTAS.sum(0)
    for rank in (None, 1, 3, IN):
        kept = basis[:, IN - (rank or ratio) :]
        inverse = kept @ torch.diag(1 / values[IN - (rank or ratio) :]) @ kept.T
        expected = start + (right - start @ total) @ inverse
        found = merge_matrices(
            "flow", DELTAS, statistics=STATISTICS, filter="cut", rank=rank, full_output=True
        )
        assert found.record["effective_rank"] == (rank or ratio)
        close(found.delta, expected, 1e-10)


def test_directions_without_data_keep_the_guess():
    x = randn(3, IN).double()
    entry = LayerStatistics(gram=x.T @ x, count=3)
    null = torch.linalg.qr(x.T, mode="complete")[0][:, 3:]
    for options in ({"filter": "solution"}, {"tau": 50.0}):
        found = merge_matrices("flow", DELTAS[:1], statistics=[entry], **options)
        close(found @ null, 0.3 * DELTAS[0] @ null, 1e-9)


@pytest.mark.parametrize(
    "options", [{"filter": "solution"}, {"filter": "cut"}, {"tau": 1.0}, {"tau": 1e5}], ids=str
)
@pytest.mark.parametrize("missing", [1, 20])
def test_grams_in_float32_of_inputs_on_a_subspace_are_those_in_float64(options, missing):
    # Their sum has eigenvalues of rounding, of either sign, where there are no inputs.
    generator = torch.Generator().manual_seed(missing)
    deltas = torch.randn(3, 6, 48, generator=generator)
    spread = torch.randn(48 - missing, 48, generator=generator)
    seen = [torch.randn(300, 48 - missing, generator=generator) @ spread for _ in deltas]
    narrow = [LayerStatistics(gram=x.T @ x, count=300) for x in seen]
    wide = [LayerStatistics(gram=x.double().T @ x.double(), count=300) for x in seen]

    def run(statistics):
        return merge_matrices("flow", deltas, statistics=statistics, init="zero", **options)

    found, right = run(narrow), run(wide)
    assert float((found - right).norm() / right.norm()) < 2e-3
    rows = torch.linalg.qr(spread.T.double()).Q
    outside = found.double() - found.double() @ rows @ rows.T
    assert float(outside.norm() / right.norm()) < 2e-3


def test_grams_in_float32_of_uneven_inputs_lose_no_direction():
    # Their least eigenvalue is eight rounding errors of the first: small, and measured.
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(3, 6, 64, generator=generator)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=generator).double()).Q
    scales = torch.logspace(0, -3, 64).double()
    seen = [(torch.randn(2000, 64, generator=generator).double() * scales) @ turn for _ in deltas]
    wide = [LayerStatistics(gram=x.T @ x, count=2000) for x in seen]
    narrow = [LayerStatistics(gram=(x.T @ x).float(), count=2000) for x in seen]
    found, right = (
        merge_matrices("flow", deltas, statistics=own, init="zero", filter="solution")
        for own in (narrow, wide)
    )
    assert float((found - right).norm() / right.norm()) < 1e-2


def test_without_a_gram_it_averages_and_says_so():
    merged = merge_matrices(
        "flow", DELTAS, statistics=[None] * EXPERTS, fallback="allow", full_output=True
    )
    assert merged.record["rest"] == "average"
    with pytest.raises(MethodError, match="needs"):
        merge_matrices("flow", DELTAS)


def test_wudi_minimises_its_loss():
    wide = randn(EXPERTS, 2 * IN, IN, seed=4).double()
    X = merge_matrices("wudi", wide)
    loss = sum(((X - d) @ d.T).square().sum() / d.square().sum() for d in wide)
    gradient = sum(2 * (X - d) @ d.T @ d / d.square().sum() for d in wide)
    assert float(gradient.norm()) < 1e-9 * float(loss)
    flowed = merge_matrices("flow", wide, gram="task", equal=True, filter="solution")
    assert float((flowed - X).norm()) < 1e-9 * float(X.norm())


@pytest.mark.parametrize("base", [0.0, 30.0])
@pytest.mark.parametrize("gram", [None, "task"])
def test_rounding_of_low_rank_experts_says_nothing(base: float, gram: str | None):
    """LoRA experts expanded in float32, or the differences of float32 checkpoints."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    exact = torch.stack([normal(32, rank) @ normal(rank, 24) for rank in (2, 3, 4)])
    start = base * normal(32, 24)
    told = (start + exact).float() - start.float()
    grams = [x.mT @ x / x.square().sum() for x in exact]
    pulled = sum(x @ g for x, g in zip(exact, grams, strict=True))
    expected = pulled @ torch.linalg.pinv(sum(grams), rtol=1e-9)
    if gram is None:
        found = merge_matrices("wudi", told)
    else:
        options = {"equal": True, "filter": "solution", "init": "zero"}
        found = merge_matrices("flow", told, gram=gram, **options)
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_wudi_does_not_square_the_condition_of_its_rows():
    generator = torch.Generator().manual_seed(1)
    Q, P = (
        torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    delta = Q @ torch.diag(torch.logspace(0, -6, 9, dtype=torch.float64)) @ P
    merged = merge_matrices("wudi", delta[None])
    assert float((merged - delta).norm() / delta.norm()) < 1e-9  # its Gram's condition is 1e12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter": "solution", "tau": 1.0}, "tau is of filter 'flow'"),
        ({"filter": "cut", "tau": 2.0}, "tau is of filter 'flow'"),
        ({"rank": 3}, "rank is of filter 'cut'"),
        ({"weights": [1.0, -1.0, 1.0][:EXPERTS] + [1.0] * (EXPERTS - 3)}, "at least 0"),
    ],
)
def test_what_has_no_part_is_refused(options, message):
    with pytest.raises(MethodError, match=message):
        merge_matrices("flow", DELTAS, gram="task", **options)
