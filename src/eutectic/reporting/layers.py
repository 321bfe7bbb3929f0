"""The matrices of a base, its experts and merged models, read and measured one at a time."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from eutectic.checkpoint.experts import Expert
from eutectic.conventions_patterns import fits
from eutectic.errors import NumericalError, RequestError
from eutectic.execution.tensor_values import as_map, read_base, read_delta
from eutectic.linalg import lapack
from eutectic.linalg.lowrank import LowRank
from eutectic.linalg.svd import Triplets
from eutectic.methods.linear import finite
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.planning.statistics_match import lacks
from eutectic.planning.tensor_plan import Source, TensorPlan
from eutectic.planning.tensors import source_in
from eutectic.reporting import matrix_measures as measures
from eutectic.reporting.schema import Alignment, Interference, Layer, Pairs, Spectrum
from eutectic.types import LayerStatistics, Treatment

_GRAM = frozenset({"gram"})
KEPT = 64  # singular values per spectrum in the file: enough for a curve on logarithmic axes


@dataclass(frozen=True, eq=False)
class LayerMatrices:
    """One matrix of the model in every checkpoint, as the linear map [out, in] that methods see."""

    name: str  # the tensor, with `[block][part]` for stacks and fused matrices
    base_norm: float  # ‖W₀‖_F
    deltas: Mapping[str, Tensor]  # expert -> Δ_t
    factors: Mapping[str, LowRank]  # expert -> thin factors of Δ_t, of adapters that store them
    merged: Mapping[str, Tensor]  # merged model -> Δ_M, the scale included
    records: Mapping[str, LayerStatistics]  # expert -> statistics with a Gram, where there are any

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        rows, columns = next(iter(self.deltas.values())).shape
        return rows, columns


def selected_layers(
    plan: Plan, merged: Mapping[str, Expert], pattern: str | None
) -> list[TensorPlan]:
    """Return the plan's matrices that match a shell pattern; every merged model has them."""
    every = [t for t in plan.tensors if t.treatment is Treatment.MATRIX]
    chosen = [t for t in every if pattern is None or fits(t.name, pattern)]
    if not chosen:
        raise RequestError(
            "no matrix to inspect: no expert changes one."
            if not every
            else f"--layers '{pattern}' matches none of {len(every)} matrices, such as "
            f"{every[0].name}."
        )
    for name, model in merged.items():
        absent = [t.name for t in chosen if not _holds(model, t)]
        if absent:
            raise RequestError(
                f"merged model '{name}' lacks {len(absent)} of {len(chosen)} matrices, or has "
                f"them in another shape, such as {absent[0]}.\n"
                "Name a merge of this base, or leave those layers out with --layers."
            )
    return chosen


def stream_matrices(
    planned: TensorPlan, inputs: Inputs, merged: Mapping[str, Expert]
) -> Iterator[LayerMatrices]:
    """Yield every matrix of one tensor: blocks of a stack, parts of a fused matrix, or itself.

    Memory: one block of the base, of every expert and of every merged model.
    """
    blocks, size = planned.blocks
    records = _records(planned, inputs)
    factors = {} if planned.layout.stacked else _factors(planned, inputs)
    names = planned.name, planned.seed_name
    for block in range(blocks):
        start = block * size
        base = read_base(planned, inputs, start, start + size)
        weight = as_map(base, planned)
        deltas = {
            s.owner: _map_of((inputs.owner(s), s), planned, inputs, start, base)
            for s in planned.experts
        }
        models = {
            n: _map_of((m, source_in(n, m, *names)), planned, inputs, start, base)
            for n, m in merged.items()
        }
        suffix = f"[{block}]" if blocks > 1 else ""
        for label, rows in planned.row_parts(len(weight)):
            yield LayerMatrices(
                planned.name + suffix + label,
                lapack.norm(weight[rows], torch.float64),
                {n: delta[rows] for n, delta in deltas.items()},
                {n: LowRank(f.left[rows], f.right) for n, f in factors.items()},
                {n: delta[rows] for n, delta in models.items()},
                records,
            )


def _map_of(
    kept: tuple[Expert, Source], planned: TensorPlan, inputs: Inputs, start: int, base: Tensor
) -> Tensor:
    """Read one block of a model as the map Δ [out, in]; `base` is that block, flat."""
    model, source = kept
    flat = read_delta(model, source, start, base, inputs)
    if not finite(flat):
        raise NumericalError(
            f"{planned.name}: NaN or Inf in '{source.owner}' or in the base.\n"
            "Repair the checkpoint, or leave the layer out with --layers."
        )
    return as_map(flat, planned)


def _holds(model: Expert, planned: TensorPlan) -> bool:
    found = source_in("", model, planned.name, planned.seed_name).tensor
    if found is None or found not in model.entries:
        return model.is_delta
    return model.entries[found].shape == planned.shape


def _factors(planned: TensorPlan, inputs: Inputs) -> dict[str, LowRank]:
    """Return the factors of adapters whose rank is low enough to be worth it."""
    found: dict[str, LowRank] = {}
    for source in planned.experts:
        pair = inputs.owner(source).factors(source.tensor or "")
        if pair is None:
            continue
        left, right = pair
        if planned.layout.transpose:
            left, right = right.mT, left.mT
        if 4 * left.shape[1] <= min(len(left), right.shape[1]):
            found[source.owner] = LowRank(left, right)
    return found


def _records(planned: TensorPlan, inputs: Inputs) -> dict[str, LayerStatistics]:
    if planned.layout.stacked or planned.layout.groups > 1:
        return {}  # the blocks see different inputs
    return {
        source.owner: statistics.read(inside, _GRAM)
        for source in planned.experts
        if (statistics := inputs.statistics.get(source.owner)) is not None
        and (inside := source.statistics.get("")) is not None
        and not lacks(statistics, inside, _GRAM)
    }


def measure_layer(matrices: LayerMatrices, error: float, rank: int | None = None) -> Layer:
    """Measure one matrix; `error` defines q, and `rank` is k: None for the int(r/T) of TSV-M.

    Cost: one float64 eigenproblem per expert, for their sum and per merged model, of the shorter
    side or of an adapter's rank; T² products of the matrix with Grams where there are any.
    """
    names = list(matrices.deltas)
    thin = {n: matrices.factors.get(n, delta) for n, delta in matrices.deltas.items()}
    leading = min(rank or max(1, min(matrices.shape) // len(names)), *matrices.shape)

    spectrum = partial(_spectrum, base_norm=matrices.base_norm, leading=leading)
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
        kept = measures.rank_within(triplets.S, error)
        shares = measures.projected_shares(triplets.first(kept), matrices.deltas.values())
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
        singular_task_interference=rounded(measures.singular_task_interference(first)),
        interference=_interference(matrices, thin, first),
    )


def plain(value: float | None) -> float | None:
    """Return a number in six digits, or None where it is not one."""
    return None if value is None or not math.isfinite(value) else rounded(value)


def rounded(value: float) -> float:
    """Return a finite number in six digits."""
    return float(f"{value:.6g}")


def _spectrum(
    delta: Tensor | LowRank, dense: Tensor, *, base_norm: float, leading: int
) -> tuple[Spectrum, Triplets]:
    triplets = measures.significant_triplets(delta)
    values, norm = triplets.S, lapack.norm(dense, torch.float64)
    kept = len(values)
    steps = torch.linspace(0, math.log(max(kept, 1)), KEPT).exp().round().int()
    positions = sorted({min(p, kept) for p in steps.tolist()}) if kept else []
    spectrum = Spectrum(
        norm=rounded(norm),
        relative_norm=plain(norm / base_norm) if base_norm else None,
        stable_rank=plain(measures.stable_rank(values)),
        effective_rank=plain(measures.effective_rank(values)),
        energy=plain(measures.energy(values, leading)),
        rank=kept,
        positions=positions,
        values=[rounded(float(values[p - 1])) for p in positions],
    )
    return spectrum, triplets


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
        return 0.0 if s == t else measures.singular_task_interference([first[s], first[t]]) / values

    def table(measure: Callable[[int, int], float]) -> Pairs:
        size = range(len(deltas))
        half = [[plain(measure(s, t)) for t in range(s + 1)] for s in size]
        return [[half[max(s, t)][min(s, t)] for t in size] for s in size]

    return Interference(
        cosine=table(lambda s, t: measures.cosine(deltas[s], deltas[t])),
        overlap_left=table(lambda s, t: measures.subspace_overlap(first[s].U, first[t].U)),
        overlap_right=table(lambda s, t: measures.subspace_overlap(first[s].V, first[t].V)),
        sign_conflicts=table(lambda s, t: measures.sign_conflicts(deltas[s], deltas[t])),
        singular=table(singular),
        activation=_activation(matrices, thin),
    )


def _activation(matrices: LayerMatrices, thin: dict[str, Tensor | LowRank]) -> Pairs | None:
    """Return tr(Δ_s A_t Δ_sᵀ)/tr(Δ_t A_t Δ_tᵀ), row s, column t."""
    if not matrices.records:
        return None

    def column(name: str) -> list[float | None]:
        record = matrices.records.get(name)
        own = 0.0 if record is None else measures.output_energy(thin[name], record)
        if record is None or not own:
            return [None] * len(thin)
        return [plain(measures.output_energy(delta, record) / own) for delta in thin.values()]

    return [list(row) for row in zip(*map(column, thin), strict=True)]
