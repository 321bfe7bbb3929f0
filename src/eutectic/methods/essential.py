"""Essential Subspace Merging: fuse the directions in which each expert moves its outputs."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from eutectic.errors import StatisticsError
from eutectic.linalg import lapack
from eutectic.linalg.core import core_space, stays_thin
from eutectic.linalg.essential import EssentialSubspace, essential_subspace
from eutectic.linalg.lowrank import LowRankStack
from eutectic.linalg.polar import polar
from eutectic.linalg.svd import dependence_tolerance
from eutectic.methods.grams import projected
from eutectic.methods.registry import (
    Context,
    Cost,
    Parameters,
    Precision,
    Rules,
    Takes,
    always,
    register,
)
from eutectic.methods.singular import TsvMParameters, tsv_m
from eutectic.types import LayerStatistics, Merged

Power = Annotated[float, Ge(0)]


@dataclass(frozen=True)
class _Exponents:
    task_power: float = 0.0
    eigenvalue_power: float = 0.0
    column_power: float = 0.0
    layer_power: float = 0.0
    factor: float = 1.0


_PRESETS = {
    "vit": _Exponents(2, 0.15, 2, 2, 2),
    "roberta": _Exponents(0, 0.15, 0, 2, 1),
    "none": _Exponents(),
    None: _Exponents(),
}


@dataclass(frozen=True, kw_only=True)
class EssentialParameters(Parameters):
    """Parameters of `esm`.

    An exponent that is given overrides the preset's.

    Attributes:
        preset: "vit" (2, 0.15, 2, 2, factor 2: every scaling of the paper, the default) or
            "roberta" (0, 0.15, 0, 2, factor 1), the two published variants; "none", or None,
            starts from no scaling at all (0, 0, 0, 0, factor 1).
        task_power: exponent of ‖Δ_t‖ relative to the experts' mean.
        eigenvalue_power: exponent of λ_i relative to the mean of the kept ones.
        column_power: exponent of the norms of the coordinates' columns relative to their mean.
        layer_power: exponent of a layer's norm relative to the mean of its group of like layers,
            applied after all layers are merged.
        factor: β, a constant in front.
        rank_fraction: directions kept per expert, as a fraction of the outputs; None: 1 / T.
        rank_tolerance: singular values of the shift, and of the concatenated factors, below this
            fraction of the largest are taken for rounding and not promoted. None: rounding of the
            stored numbers. Zero promotes everything.
    """

    preset: Literal["vit", "roberta", "none"] | None = "vit"
    task_power: Power | None = None
    eigenvalue_power: Power | None = None
    column_power: Power | None = None
    layer_power: Power | None = None
    factor: Annotated[float, Gt(0)] | None = None
    rank_fraction: Annotated[float, Gt(0), Le(1)] | None = None
    rank_tolerance: Annotated[float, Ge(0), Le(1)] | None = None

    def resolved(self) -> _Exponents:
        """Return the preset's exponents under the explicit ones."""
        given = {f.name: getattr(self, f.name) for f in fields(_Exponents)}
        return replace(_PRESETS[self.preset], **{k: v for k, v in given.items() if v is not None})

    def rank(self, out_features: int, experts: int) -> int:
        """Return k, the directions kept per expert."""
        if self.rank_fraction is None:
            return max(1, out_features // experts)
        return max(1, int(out_features * self.rank_fraction))


def _layer_factors(norms: Sequence[float], parameters: EssentialParameters) -> list[float]:
    """Return (‖Δ‖ / mean ‖Δ‖)^p for the merged matrices of like layers."""
    power = parameters.resolved().layer_power
    mean = sum(norms) / len(norms)
    return [(norm / mean) ** power if mean > 0 else 1.0 for norm in norms]


def _explain(shape: tuple[int, ...], parameters: EssentialParameters, precision: Precision) -> str:
    experts, out_features, in_features = shape
    k = parameters.rank(out_features, experts)
    side = min(out_features, in_features)
    return (
        f"{k} of {out_features} output directions per expert from eigenproblems of at most "
        f"{side}×{side}, then polar factors of {out_features}×{k * experts} and "
        f"{k * experts}×{in_features}"
    )


@register(
    "esm",
    summary="Fuse, per layer, the output directions that each expert's own inputs excite most.",
    paper="Model merging in the essential subspace, arXiv 2602.20208",
    parameters=EssentialParameters,
    laws={"permutation", "homogeneous", "zero"},
    takes=Takes(factors=True, needs=always({"gram"}), fallback=always("tsv_m")),
    # Measured with 4 experts at sides of 896 and 2048, and with up to 5.4 times as many outputs,
    # where the directions of all experts side by side are nearly a square matrix of the outputs.
    cost=Cost(workspace=always(6.0), products=19.0, tall=3.7, keeps_rows=always(True)),
    rules=Rules(explain=_explain, finish=_layer_factors),
)
def esm(deltas: Tensor | LowRankStack, parameters: EssentialParameters, context: Context) -> Merged:
    """Return β · mean(σ(E_*)) polar(E_*) · mean(σ(C_*)) polar(C_*).

    E_t `[out, k]` are the first k = int(out / T) principal directions of the output shift X_t Δ_tᵀ
    (the eigenvectors of Δ_t A_t Δ_tᵀ: the Gram suffices) and C_t = E_tᵀ Δ_t their coordinates.
    C_t takes the factor (‖Δ_t‖ / mean_s ‖Δ_s‖)^p_task; the columns of E_t and the rows of C_t
    take (λ_i / mean λ)^p_eig, normalised to mean 1; both are concatenated over the experts into
    E_* `[out, kT]` and C_* `[kT, in]`; column j of C_* takes (‖C_*,j‖ / mean)^p_col. The factor
    between layers, (‖Δ‖ / mean of like layers)^p_layer, needs all norms and is applied afterwards
    by the engine through `finish`; a group is the tensor's name without its layer numbers.
    The parts of a fused matrix and the matrices of a stack are layers of their own.

    Shapes: deltas `[T, out, in]` float32 or float64 -> `[out, in]`; eigenproblems in float64, the
    rest in the dtype of the deltas (`precision="exact"`: all float64). Cost: T eigenproblems of
    min(out, in) at most, and two polar factors of `[out, kT]` and `[kT, in]`. Of Grams in few rows
    and a diagonal no matrix `[in, in]` is formed where in ≥ out.
    T = 1 gives the expert's factors flattened, not the expert. A zero delta contributes nothing;
    all deltas zero give zero. Grams that determine no direction of any expert (all zero) leave the
    matrix to `tsv_m`; the record tells `rest` and `reason`.

    When k exceeds what Δ_t and its tokens determine, only the determined directions enter, and
    the mean singular values are taken over the support. The record tells `rank` (k), `directions`
    (kept per expert) and, where some fall short, `short` (the experts' names). Matrices without
    statistics are merged by `tsv_m`.

    Thin factors: directions and coordinates are found in their core of side Σ r_t, in float64,
    from VᵀA_tV, V a basis of the factors' rows: that is all of a Gram that a shift can show.

    Deviations from the source: presets are the exponents only (the official ViT code takes other
    matrices than in-projection and MLP by TSV-M, the RoBERTa code 2-D embeddings); here every
    matrix with a Gram takes ESM. The official code fills missing directions with arbitrary ones;
    here they are left out (numerical support). Its task factor uses the norm of the coordinates
    on a completed basis, which is ‖Δ_t‖ whenever there are at least `out` tokens.

    Raises:
        StatisticsError: a Gram of another width than the matrix.
        NumericalError: NaN or Inf in a Gram.

    Reference: Model merging in the essential subspace, arXiv 2602.20208; Essential subspace
    merging with mixture of experts, arXiv 2606.19164.
    """
    weighted = context.weigh(deltas)
    exponents = parameters.resolved()
    experts, out_features, in_features = weighted.shape
    k = parameters.rank(out_features, experts)
    if parameters.rank_tolerance is not None:
        tolerance = own_tolerance = parameters.rank_tolerance
    else:
        eps = torch.finfo(deltas.dtype).eps
        own_tolerance = eps * (out_features**0.5 + in_features**0.5)
        # Directions come from eigenproblems in float64, and are no better than those.
        tolerance = max(eps, dependence_tolerance(torch.float64))

    # Eigenproblems are float64; what they give is rounded to the deltas' own precision.
    dtype = torch.float64 if context.precision == "exact" else deltas.dtype
    space = None
    statistics = context.statistics or (None,) * experts
    if isinstance(weighted, LowRankStack):
        if stays_thin(weighted):
            space, dtype = core_space(weighted), torch.float64
            basis = space.right
            statistics = [None if s is None else _inside(s, basis) for s in statistics]
        weighted = weighted.dense() if space is None else space.cores
    norms = lapack.column_norms(weighted.flatten(1).mT, torch.float64)
    shares = (norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny)) ** exponents.task_power

    left: list[Tensor] = []
    right: list[Tensor] = []
    kept: list[int] = []
    for t, delta in enumerate(weighted):
        where = f"{context.tensor or 'the layer'}, expert '{context.experts[t]}'"
        subspace = _subspace(delta, statistics[t], k, own_tolerance**2, where)
        scales = _eigenvalue_scales(subspace.eigenvalues, exponents.eigenvalue_power)
        directions = subspace.directions.to(dtype)
        left.append(directions * scales.to(dtype))
        coordinates = directions.T @ delta.to(dtype)
        right.append(coordinates * (scales * shares[t]).to(dtype).unsqueeze(1))
        kept.append(len(scales))

    record: dict[str, Any] = {"rank": k, "directions": kept}
    short = [name for name, m in zip(context.experts, kept, strict=True) if m < k]
    if short:
        record["short"] = short
    if not any(kept):
        if not bool(weighted.any()):
            zero = torch.zeros(out_features, in_features, dtype=deltas.dtype, device=deltas.device)
            return Merged(zero, record)
        reason = "no expert's inputs move its outputs: the Grams determine no direction"
        rest = tsv_m(deltas, TsvMParameters(), context)
        delta = rest.delta if isinstance(rest, Merged) else rest
        return Merged(delta, record | {"rest": "tsv_m", "reason": reason})
    columns = torch.cat(right) if space is None else torch.cat(right) @ space.right.mT
    column_norms = lapack.column_norms(columns)
    columns = columns * (column_norms / column_norms.mean()) ** exponents.column_power
    left_factor, right_factor = (
        polar(matrix, rank_tolerance=tolerance, precision=context.precision)
        for matrix in (torch.cat(left, dim=1), columns)
    )
    flatness = left_factor.mean_singular_value * right_factor.mean_singular_value
    outputs = left_factor.factor if space is None else space.left @ left_factor.factor
    merged = (exponents.factor * flatness) * (outputs @ right_factor.factor)
    return Merged(merged.to(deltas.dtype), record)


def _inside(entry: LayerStatistics, basis: Tensor) -> LayerStatistics:
    """Return what the shifts of thin factors can show of a Gram."""
    inner = projected(entry, basis)
    # Tokens bound the rank of a Gram that is theirs alone.
    return inner if entry.gram_diagonal is None else replace(inner, count=0)


def _subspace(
    delta: Tensor, statistics: LayerStatistics | None, k: int, rank_tolerance: float, where: str
) -> EssentialSubspace:
    if statistics is None:
        raise StatisticsError(f"{where}: esm needs statistics with a Gram.")
    return essential_subspace(delta, statistics, k, rank_tolerance=rank_tolerance, where=where)


def _eigenvalue_scales(eigenvalues: Tensor, power: float) -> Tensor:
    """Return (λ_i / mean λ)^p, normalised to mean 1."""
    if not len(eigenvalues):
        return eigenvalues
    scales = (eigenvalues / eigenvalues.mean()) ** power
    return scales / scales.mean()
