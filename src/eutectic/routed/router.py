"""Routers: from the mean input of each sample to a score per expert.

Both are one linear map per layer, so that they share one interface and one way of being stored:
scores = pooled Wᵀ + b, with `pooled` normalised first where the router says so.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eutectic.errors import StatisticsError
from eutectic.linalg import lapack
from eutectic.linalg.rows_and_diagonal import few_rows, invert, times_without
from eutectic.models.batches import without_autocast
from eutectic.types import LayerStatistics

RouterKind = Literal["discriminant", "prototype", "mad", "sim"]
POOLED = frozenset({"pooled_gram", "pooled_sum"})  # what the discriminant reads of a layer


class Router(nn.Module):
    """Scores of T experts for every sample; the largest wins.

    The tensors stay float32 whatever the model is converted to: rounding them moves decisions.
    """

    kind: RouterKind
    weight: Tensor  # [T, in]
    bias: Tensor  # [T]

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    def forward(self, pooled: Tensor) -> Tensor:
        """Return scores `[N, T]` of pooled inputs `[N, in]`, float32."""
        with without_autocast(pooled.device):
            return nn.functional.linear(pooled.float(), self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for name, buffer in [*self.named_buffers()]:
            moved = fn(buffer)
            kept = moved if moved.dtype == torch.float32 else buffer.to(moved.device)
            self._buffers[name] = kept
        return self


class PrototypeRouter(Router):
    """Cosine of the pooled input with each expert's mean input: the published rule.

    Reference: arXiv 2606.19164.
    """

    kind: RouterKind = "prototype"

    def forward(self, pooled: Tensor) -> Tensor:
        """Return cosines `[N, T]`; a pooled input of zero scores zero everywhere."""
        return super().forward(nn.functional.normalize(pooled.float(), dim=-1))


class DiscriminantRouter(Router):
    """Log-posteriors of the linear discriminant: x̄ᵀΣ⁻¹p_t − ½ p_tᵀΣ⁻¹p_t.

    They are so up to a term that all experts share.
    """

    kind: RouterKind = "discriminant"


def prototype_router(
    statistics: Sequence[LayerStatistics], where: str, names: Sequence[str] | None = None
) -> PrototypeRouter:
    """Return the published router: p_t = Σx / n, normalised.

    `where` and `names` tell the layer and the experts in messages.
    """
    rows: list[Tensor] = []
    for t, entry in enumerate(statistics):
        if entry.input_sum is None or entry.count < 1:
            raise StatisticsError(
                f"{where}, {_expert(t, names)}: no input sum over at least one token, so no "
                "prototype.\nCollect the statistics again, or route with another router."
            )
        rows.append(entry.input_sum.double() / entry.count)
    prototypes = torch.stack(rows)
    norms = prototypes.norm(dim=1)
    if not bool(torch.isfinite(norms).all()) or float(norms.min()) == 0:
        faulty = [t for t, norm in enumerate(norms.tolist()) if not 0 < norm < float("inf")]
        bad = ", ".join(_expert(t, names) for t in faulty)
        raise StatisticsError(
            f"{where}: the prototypes of {bad} have norm zero or are not finite; no cosine "
            "can be taken.\nLeave this layer out, or check the proxy data."
        )
    return PrototypeRouter(prototypes / norms.unsqueeze(1), torch.zeros(len(rows)))


def _expert(t: int, names: Sequence[str] | None) -> str:
    return f"expert {t}" if names is None else f"expert '{names[t]}'"


def discriminant_router(
    statistics: Sequence[LayerStatistics],
    where: str,
    shrinkage: float | None = None,
    names: Sequence[str] | None = None,
) -> DiscriminantRouter:
    """Return the linear discriminant of the experts' pooled inputs.

    p_t is the mean pooled input of expert t and Σ the within-expert covariance, pooled over the
    experts and shrunk towards a multiple of the identity: Σ = (1 − γ) S + γ tr(S)/in · I. γ is the
    oracle-approximating shrinkage of S (Chen et al. 2010, arXiv 0907.4698), which needs no more
    than tr S, tr S² and the number of samples; `shrinkage` is taken in its place. The multiple is
    at least twice the stored sums' rounding, ε Σ_t tr(pooled_gram_t) / degrees: what varies less
    about a large mean is noise. W = (p_t − p̄)ᵀΣ⁻¹ and the bias matches it: scores of one sample
    differ from x̄ᵀΣ⁻¹p_t − ½ p_tᵀΣ⁻¹p_t by a constant over the experts. Where all samples of every
    expert are equal (S = 0), Σ is the identity: the nearest mean wins. Pooled Grams in rows, few of
    them together, are not multiplied out: O(in·k²) for k rows. Beside leading directions and a
    diagonal, the part of a mean outside of the directions is taken off the diagonal.
    """
    means: list[Tensor] = []
    samples, rounding = 0, 0.0
    for t, entry in enumerate(statistics):
        if not has_pooled(entry):
            raise StatisticsError(
                f"{where}, {_expert(t, names)}: no pooled sums over at least one sample, which the "
                "discriminant router needs.\nCollect again, or use router='prototype'."
            )
        assert entry.pooled_sum is not None
        means.append(entry.pooled_sum.double() / entry.sample_count)
        # Bounds the spectral norm of what rounding moved: |G_ij| ≤ √(G_ii G_jj).
        rounding += 2 * _stored_eps(entry) * _pooled_trace(entry)
        samples += entry.sample_count
    degrees = samples - len(means)
    if degrees < 1:
        raise StatisticsError(
            f"{where}: {samples} samples of {len(means)} experts leave no within-expert scatter.\n"
            "Collect over more samples, or use router='prototype'."
        )
    prototypes = torch.stack(means)
    if not (math.isfinite(rounding) and bool(torch.isfinite(prototypes).all())):
        raise StatisticsError(f"{where}: NaN or Inf in the pooled statistics; collect again.")
    centre = prototypes.mean(0)
    offsets = prototypes - centre
    solve = _solve_in_rows if _in_few_rows(statistics) else _solve
    weight = solve(offsets, statistics, _Spread(degrees, shrinkage, rounding / degrees))
    if weight is None:
        raise StatisticsError(
            f"{where}: the pooled sums contradict each other: no samples have such a scatter.\n"
            "Collect the statistics again, or use router='prototype'."
        )
    bias = -(weight @ centre) - 0.5 * (weight * offsets).sum(1)
    return DiscriminantRouter(weight, bias)


@dataclass(frozen=True)
class _Spread:
    """How a scatter becomes a covariance: its degrees of freedom, γ or None, and the floor."""

    degrees: int
    shrinkage: float | None
    floor: float


def _solve(
    offsets: Tensor, statistics: Sequence[LayerStatistics], spread: _Spread
) -> Tensor | None:
    """Return offsets·Σ⁻¹, or None where no samples have such a scatter."""
    scatter: Tensor | None = None
    for entry in statistics:
        within = _within(entry)
        scatter = within if scatter is None else scatter + within
    assert scatter is not None
    covariance = shrunk(scatter / spread.degrees, spread.degrees, spread.shrinkage, spread.floor)
    lower = lapack.cholesky(covariance)
    return None if lower is None else torch.cholesky_solve(offsets.T, lower).T


def _within(entry: LayerStatistics) -> Tensor:
    """Return the scatter of one expert's samples about their mean `[in, in]`."""
    if entry.pooled_diagonal is None or entry.pooled_gram is not None:
        assert entry.pooled_sum is not None
        total, pooled = entry.pooled_sum.double(), entry.dense("pooled_gram")
        assert pooled is not None
        return pooled - torch.outer(total, total) / entry.sample_count
    rows, rest, taken = _moments(entry)
    return rows.T @ rows + rest.diag() - torch.outer(taken, taken)


def _moments(entry: LayerStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """Return F, e and m of the scatter FᵀF + diag(e) − m mᵀ about the mean, from sums in rows.

    m = s/√n. Where the rows are leading directions and a diagonal stands for the others, these hold
    no products of different inputs from which mmᵀ could be taken: there m is cut to the rows' span,
    and the squares of the rest are taken off the diagonal.
    """
    assert entry.pooled_factor is not None and entry.pooled_sum is not None
    rows = entry.pooled_factor.double()
    mean = entry.pooled_sum.double() / entry.sample_count**0.5
    if entry.pooled_diagonal is None:
        return rows, torch.zeros_like(mean), mean
    seen = torch.linalg.pinv(rows @ rows.T, hermitian=True) @ (rows @ mean)
    inside = seen @ rows
    rest = (entry.pooled_diagonal.double() - (mean - inside).square()).clamp_min(0)
    # m mᵀ ≤ FᵀF where |seen| ≤ 1; a sketch keeps a little less than the directions hold.
    return rows, rest, inside / max(1.0, float(seen.norm()))


def _solve_in_rows(
    offsets: Tensor, statistics: Sequence[LayerStatistics], spread: _Spread
) -> Tensor | None:
    """Return the same without a matrix of the inputs' width: of Σ (FᵀF + diag(e) − m mᵀ)."""
    parts = [_moments(entry) for entry in statistics]
    rows, taken = torch.cat([own for own, _, _ in parts]), torch.stack([m for _, _, m in parts])
    rest, p = torch.stack([e for _, e, _ in parts]).sum(0), offsets.shape[1]
    whole = torch.cat([rows, taken])
    signs = torch.cat([torch.ones(len(rows)), -torch.ones(len(taken))]).double()
    own = signs @ whole.square()
    trace = float((rest + own).sum()) / spread.degrees
    if trace <= 0:
        return offsets
    inner = (whole @ whole.T).square()
    square = float(rest.square().sum() + 2 * (rest @ own) + signs @ inner @ signs)
    gamma = spread.shrinkage
    if gamma is None:
        gamma = _estimated(p, trace, square / spread.degrees**2, spread.degrees)
    part = (1 - gamma) / spread.degrees
    even = max(gamma * trace / p, spread.floor)
    solved = invert(rows * part**0.5, rest * part + even, torch.empty(0, dtype=torch.long))
    return None if solved is None else times_without(offsets, solved[0], taken * part**0.5)


def _in_few_rows(statistics: Sequence[LayerStatistics]) -> bool:
    """Tell whether all pooled Grams are rows, fewer of them than a matrix is worth."""
    factors = [
        e.pooled_factor for e in statistics if e.pooled_gram is None and e.has("pooled_gram")
    ]
    held = [factor for factor in factors if factor is not None]
    if len(held) < len(statistics):
        return False
    return few_rows(sum(map(len, held)) + len(held), held[0].shape[1])


def _stored_eps(entry: LayerStatistics) -> float:
    held = entry.pooled_gram if entry.pooled_gram is not None else entry.pooled_factor
    assert held is not None
    return torch.finfo(torch.promote_types(held.dtype, torch.float32)).eps


def _pooled_trace(entry: LayerStatistics) -> float:
    if entry.pooled_gram is not None:
        return float(entry.pooled_gram.double().trace())
    assert entry.pooled_factor is not None
    trace = float(entry.pooled_factor.double().square().sum())
    rest = entry.pooled_diagonal
    return trace if rest is None else trace + float(rest.double().sum())


def pooled_form(entry: LayerStatistics, weight: Tensor) -> Tensor:
    """Return W·G·Wᵀ `[T, T]` in float64, G the pooled Gram in any form, W `[T, in]`."""
    weight = weight.double()
    if entry.pooled_gram is not None:
        return weight @ entry.pooled_gram.double() @ weight.T
    assert entry.pooled_factor is not None
    seen = weight @ entry.pooled_factor.double().T
    form, rest = seen @ seen.T, entry.pooled_diagonal
    return form if rest is None else form + (weight * rest.double()) @ weight.T


def has_pooled(entry: LayerStatistics) -> bool:
    """Tell whether a layer's statistics suffice for the discriminant router."""
    return entry.pooled_sum is not None and entry.has("pooled_gram") and entry.sample_count > 0


def shrunk(
    covariance: Tensor, degrees: int, shrinkage: float | None = None, floor: float = 0.0
) -> Tensor:
    """Return (1 − γ) S + max(γ tr(S)/p, floor) I; γ is estimated where not given; I for S = 0."""
    p, gamma = len(covariance), shrinkage
    identity = torch.eye(p, dtype=covariance.dtype)
    trace = float(covariance.trace())
    if trace <= 0:
        return identity
    if gamma is None:
        gamma = _estimated(p, trace, float((covariance * covariance).sum()), degrees)
    return (1 - gamma) * covariance + max(gamma * trace / p, floor) * identity


def _estimated(p: int, trace: float, square: float, degrees: int) -> float:
    """Return γ of arXiv 0907.4698 from tr S and tr S²."""
    excess = square - trace**2 / p
    above = (1 - 2 / p) * square + trace**2
    below = (degrees + 1 - 2 / p) * excess
    return min(1.0, above / below) if below > 0 else 1.0
