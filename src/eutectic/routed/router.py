"""Routers: from the mean input of each sample to a score per expert.

Both are one linear map per layer, so that they share one interface and one way of being stored:
scores = pooled Wᵀ + b, with `pooled` normalised first where the router says so.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eutectic.errors import StatisticsError
from eutectic.linalg import lapack
from eutectic.types import LayerStatistics

RouterKind = Literal["discriminant", "prototype"]


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
        with torch.autocast(pooled.device.type, enabled=False):
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
    expert are equal (S = 0), Σ is the identity: the nearest mean wins.
    """
    means: list[Tensor] = []
    scatter: Tensor | None = None
    samples, rounding = 0, 0.0
    for t, entry in enumerate(statistics):
        if not has_pooled(entry):
            raise StatisticsError(
                f"{where}, {_expert(t, names)}: no pooled sums over at least one sample, which the "
                "discriminant router needs.\nCollect again, or use router='prototype'."
            )
        assert entry.pooled_sum is not None and entry.pooled_gram is not None
        total = entry.pooled_sum.double()
        within = entry.pooled_gram.double() - torch.outer(total, total) / entry.sample_count
        scatter = within if scatter is None else scatter + within
        means.append(total / entry.sample_count)
        # Bounds the spectral norm of what rounding moved: |G_ij| ≤ √(G_ii G_jj).
        stored = torch.finfo(torch.promote_types(entry.pooled_gram.dtype, torch.float32)).eps
        rounding += 2 * stored * float(entry.pooled_gram.double().trace())
        samples += entry.sample_count
    assert scatter is not None
    degrees = samples - len(means)
    if degrees < 1:
        raise StatisticsError(
            f"{where}: {samples} samples of {len(means)} experts leave no within-expert scatter.\n"
            "Collect over more samples, or use router='prototype'."
        )
    covariance = shrunk(scatter / degrees, degrees, shrinkage, rounding / degrees)
    prototypes = torch.stack(means)
    if not bool(torch.isfinite(covariance).all() and torch.isfinite(prototypes).all()):
        raise StatisticsError(f"{where}: NaN or Inf in the pooled statistics; collect again.")
    centre = prototypes.mean(0)
    offsets = prototypes - centre
    lower = lapack.cholesky(covariance)
    if lower is None:
        raise StatisticsError(
            f"{where}: the pooled sums contradict each other: no samples have such a scatter.\n"
            "Collect the statistics again, or use router='prototype'."
        )
    weight = torch.cholesky_solve(offsets.T, lower).T
    bias = -(weight @ centre) - 0.5 * (weight * offsets).sum(1)
    return DiscriminantRouter(weight, bias)


def has_pooled(entry: LayerStatistics) -> bool:
    """Tell whether a layer's statistics suffice for the discriminant router."""
    return entry.pooled_sum is not None and entry.pooled_gram is not None and entry.sample_count > 0


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
        square = float((covariance * covariance).sum())
        excess = square - trace**2 / p
        above = (1 - 2 / p) * square + trace**2
        below = (degrees + 1 - 2 / p) * excess
        gamma = min(1.0, above / below) if below > 0 else 1.0
    return (1 - gamma) * covariance + max(gamma * trace / p, floor) * identity


ROUTERS: dict[str, type[Router]] = {r.kind: r for r in (DiscriminantRouter, PrototypeRouter)}
