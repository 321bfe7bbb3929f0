"""Everything that an inspection says about one matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eutectic.linalg import lapack
from eutectic.linalg.lowrank import LowRank
from eutectic.linalg.svd import Triplets
from eutectic.reporting.matrices import LayerMatrices
from eutectic.reporting.matrix_measures import (
    cosine,
    effective_rank,
    energy,
    output_energy,
    projected_shares,
    rank_within,
    sign_conflicts,
    significant_triplets,
    singular_task_interference,
    stable_rank,
    subspace_overlap,
)
from eutectic.reporting.schema import Alignment, Interference, Layer, Pairs, Spectrum

KEPT = 64  # singular values per spectrum in the file: enough for a curve on logarithmic axes


def measure_layer(matrices: LayerMatrices, error: float, rank: int | None = None) -> Layer:
    """Measure one matrix; `error` defines q, and `rank` is k: None for the int(r/T) of TSV-M.

    Cost: one float64 eigenproblem per expert, for their sum and per merged model, of the shorter
    side or of an adapter's rank; T² products of the matrix with Grams where there are any.
    """
    names = list(matrices.deltas)
    thin = {n: matrices.factors.get(n, delta) for n, delta in matrices.deltas.items()}
    leading = min(rank or max(1, min(matrices.shape) // len(names)), *matrices.shape)

    def spectrum(delta: Tensor | LowRank, dense: Tensor) -> tuple[Spectrum, Triplets]:
        triplets = significant_triplets(delta)
        norm = lapack.norm(dense, torch.float64)
        return _spectrum(triplets.S, norm, matrices.base_norm, leading), triplets

    experts: dict[str, Spectrum] = {}
    first: list[Triplets] = []
    for name, delta in matrices.deltas.items():
        experts[name], triplets = spectrum(thin[name], delta)
        first.append(triplets.first(leading))
    total = _sum(list(thin.values()), list(matrices.deltas.values()))
    whole, _ = spectrum(total, total.dense() if isinstance(total, LowRank) else total)
    models: dict[str, Spectrum] = {}
    alignment: dict[str, Alignment] = {}
    for name, delta in matrices.merged.items():
        models[name], triplets = spectrum(delta, delta)
        kept = rank_within(triplets.S, error)
        shares = projected_shares(triplets.first(kept), matrices.deltas.values())
        ratio = {n: plain(float(share)) for n, share in zip(names, shares, strict=True)}
        alignment[name] = Alignment(rank=kept, ratio=ratio)
    return Layer(
        name=matrices.name,
        shape=matrices.shape,
        leading=leading,
        base_norm=rounded(matrices.base_norm),
        experts=experts,
        sum=whole,
        merged=models,
        alignment=alignment,
        singular_task_interference=rounded(singular_task_interference(first)),
        interference=_interference(matrices, thin, first),
    )


def plain(value: float | None) -> float | None:
    """Return a number in six digits, or None where it is not one."""
    return None if value is None or not math.isfinite(value) else rounded(value)


def rounded(value: float) -> float:
    """Return a finite number in six digits."""
    return float(f"{value:.6g}")


def _spectrum(values: Tensor, norm: float, base_norm: float, leading: int) -> Spectrum:
    kept = len(values)
    steps = torch.linspace(0, math.log(max(kept, 1)), KEPT).exp().round().int()
    positions = sorted({min(p, kept) for p in steps.tolist()}) if kept else []
    return Spectrum(
        norm=rounded(norm),
        relative_norm=plain(norm / base_norm) if base_norm else None,
        stable_rank=plain(stable_rank(values)),
        effective_rank=plain(effective_rank(values)),
        energy=plain(energy(values, leading)),
        rank=kept,
        positions=positions,
        values=[rounded(float(values[p - 1])) for p in positions],
    )


def _sum(thin: Sequence[Tensor | LowRank], dense: Sequence[Tensor]) -> Tensor | LowRank:
    """Return ΣΔ_t, as thin factors where all are and their ranks add up to less than a side."""
    factors = [f for f in thin if isinstance(f, LowRank)]
    if len(factors) == len(thin):
        joined = LowRank(
            torch.cat([f.left for f in factors], 1), torch.cat([f.right for f in factors])
        )
        if 2 * joined.left.shape[1] <= min(joined.shape):
            return joined
    total = dense[0].clone()
    for delta in dense[1:]:
        total += delta
    return total


def _interference(
    matrices: LayerMatrices, thin: dict[str, Tensor | LowRank], first: Sequence[Triplets]
) -> Interference:
    deltas = list(matrices.deltas.values())

    def singular(s: int, t: int) -> float:
        if not (len(first[s].S) and len(first[t].S)):
            return math.nan
        values = float(first[s].S.sum() + first[t].S.sum())
        return 0.0 if s == t else singular_task_interference([first[s], first[t]]) / values

    def table(measure: Callable[[int, int], float]) -> Pairs:
        size = range(len(deltas))
        half = [[plain(measure(s, t)) for t in range(s + 1)] for s in size]
        return [[half[max(s, t)][min(s, t)] for t in size] for s in size]

    return Interference(
        cosine=table(lambda s, t: cosine(deltas[s], deltas[t])),
        overlap_left=table(lambda s, t: subspace_overlap(first[s].U, first[t].U)),
        overlap_right=table(lambda s, t: subspace_overlap(first[s].V, first[t].V)),
        sign_conflicts=table(lambda s, t: sign_conflicts(deltas[s], deltas[t])),
        singular=table(singular),
        activation=_activation(matrices, thin),
    )


def _activation(matrices: LayerMatrices, thin: dict[str, Tensor | LowRank]) -> Pairs | None:
    """Return tr(Δ_s A_t Δ_sᵀ)/tr(Δ_t A_t Δ_tᵀ), row s, column t."""
    if not matrices.records:
        return None

    def column(name: str) -> list[float | None]:
        record = matrices.records.get(name)
        own = 0.0 if record is None else output_energy(thin[name], record)
        if record is None or not own:
            return [None] * len(thin)
        return [plain(output_energy(delta, record) / own) for delta in thin.values()]

    return [list(row) for row in zip(*map(column, thin), strict=True)]
