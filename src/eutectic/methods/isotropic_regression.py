"""RegMean with its spectrum made flat in the metric of the inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor

from eutectic.linalg.gram import explain_routes
from eutectic.linalg.leading import explain_leading, leading_singular
from eutectic.linalg.lowrank import LowRank, LowRankStack
from eutectic.linalg.metric import Metric, WideMetric, is_wide, mean_metric
from eutectic.linalg.remembered import digest
from eutectic.methods.grams import negative_weights, participants
from eutectic.methods.isotropic import IsoAParameters, merged_in_metrics, thin_in_metrics
from eutectic.methods.registry import Context, Cost, Precision, Rules, Takes, always, register


@dataclass(frozen=True, kw_only=True)
class IsoRegMeanParameters(IsoAParameters):
    """Parameters of `iso_regmean`.

    Attributes:
        support: as in `iso_c`.
        rank_tolerance: as in `iso_c`.
        ridge: as in `iso_a`.
        metric_rank: as in `iso_a`, of the mean metric alone.
        metric_degree: as in `iso_a`.
        spectrum: p, what becomes of the singular values: 0 makes them equal, 1 leaves them.
        directions: R, how many leading ones are kept; None: all. The result has this rank.
    """

    spectrum: Annotated[float, Ge(0), Le(1)] = 0.3
    directions: Annotated[int, Ge(1)] | None = None


def _explain(shape: tuple[int, ...], parameters: IsoRegMeanParameters, precision: Precision) -> str:
    _, out, inner = shape
    how = parameters.powers(precision)
    root = f"root of the mean input metric by an eigenproblem of side {inner}"
    if how is not None and is_wide(inner, how[0]):
        root = (
            f"root of the mean input metric on {how[0]} of {inner} directions, a polynomial beyond"
        )
    kept = min(parameters.directions or out, out, inner)
    return explain_routes([root, explain_leading((out, inner), kept, precision)], precision)


@register(
    "iso_regmean",
    summary="RegMean with a flat spectrum in the metric of the inputs, at any rank.",
    paper="This project; RegMean is arXiv 2212.09849, Iso-C arXiv 2502.04959",
    parameters=IsoRegMeanParameters,
    laws={"permutation", "homogeneous", "zero", "absent", "rotation"},
    takes=Takes(factors=True, core_grams=True, needs=always({"gram"}), fallback=always("iso_c")),
    cost=Cost(
        workspace=lambda count: 1.5 + 28 / count, keeps_rows=lambda p: p.metric_rank != "full"
    ),
    rules=Rules(
        default_scale=always(2.0),
        explain=_explain,
        check=negative_weights,
        thin=lambda deltas, parameters, context: thin_iso_regmean(deltas, parameters, context),
    ),
)
def iso_regmean(
    deltas: Tensor | LowRankStack, parameters: IsoRegMeanParameters, context: Context
) -> Tensor:
    """Return U_R f(S_R) V_RᵀC̄^{-1/2}, where Σ w_tΔ_tC_t·C̄^{-1/2}/Σ w_t = U S Vᵀ.

    C_t is the regularised second moment of expert t's inputs, as in `iso_a`, and C̄ their weighted
    mean. Of all matrices M = (Σ w_tΔ_tC_t)(Σ w_tC_t)⁻¹ has the outputs nearest to every expert's
    (RegMean), and the R leading triplets of MC̄^{1/2} are the nearest ones of rank R (reduced-rank
    regression): what an adapter of rank R should hold of a merge. f(S) = S^p·ΣS/ΣS^p, over the kept
    values, makes the directions more alike, as Iso-C does, since those that several experts share
    outweigh all others. p = 1 with all directions is RegMean with that ridge; p = 0 with C_t = I is
    Iso-C divided by Σ w_t.

    Shapes: `[T, out, in]` and T Grams `[in, in]` -> `[out, in]`. Cost: T products with the Grams,
    one root of the mean metric where `iso_a` takes T + 1, and R leading singular triplets. An
    expert without inputs enters with C_t = I. At T = 1 the expert with its spectrum changed; zero
    deltas give zero; rank deficiency as in `iso_c`. Where singular values are equal across the cut,
    which of them are kept is a matter of choice.

    Thin factors: as in `iso_a`; the result stays thin too.

    Raises:
        MethodError: negative weights.
    """
    return merged_in_metrics(deltas, parameters, context, _merged)


def thin_iso_regmean(
    deltas: LowRankStack, parameters: IsoRegMeanParameters, context: Context
) -> LowRank | None:
    """Return `iso_regmean` of thin factors as thin factors, None where they have to be expanded."""
    return thin_in_metrics(deltas, parameters, context, _merged)


def _merged(
    deltas: Tensor | LowRankStack,
    metrics: Sequence[Metric],
    parameters: IsoRegMeanParameters,
    context: Context,
    tolerance: float | None,
) -> Tensor:
    """Return the merge in float64; the bound is that of the expanded deltas."""
    whole = sum(context.weights)
    total = torch.zeros(deltas.shape[1:], dtype=torch.float64, device=deltas.device)
    present = participants(context)
    if not present:
        return total
    own: list[Metric] = []
    each = list(deltas)
    for t in present:
        weight = context.weights[t] / whole
        total += weight * shifted(metrics[t], each[t])
        own.append(_scaled(metrics[t], weight * len(present)))
    mean = mean_metric(own, total)
    total = mean.times(total, -0.5)
    bound: dict[str, Any] = {"tolerance": tolerance, "precision": context.precision}
    most = min(total.shape) if parameters.directions is None else parameters.directions
    kept = leading_singular(total, most, seed=context.seed_for("directions"), **bound)
    values = kept.S**parameters.spectrum if parameters.spectrum else torch.ones_like(kept.S)
    values = values * (kept.S.sum() / values.sum()) if len(values) and values.sum() else kept.S
    return mean.times((kept.U * values) @ kept.V.mT, -0.5)


def _scaled(metric: Metric, share: float) -> Metric:
    """Return share·C."""
    if share == 1:
        return metric
    changed: dict[str, Any] = {
        "isotropic": metric.isotropic * share,
        "key": metric.key and digest(metric.key, share),
    }
    if isinstance(metric, WideMetric):
        return replace(metric, scale=metric.scale * share, **changed)
    rows = None if metric.rows is None else metric.rows * share**0.5
    matrix = None if metric.matrix is None else metric.matrix * share
    return replace(metric, rows=rows, matrix=matrix, **changed)


def shifted(metric: Metric, matrix: Tensor | LowRank) -> Tensor:
    """Return M·C `[n, in]` in float64, by products alone; of a thin M those of its right factor."""
    if isinstance(matrix, LowRank):
        return matrix.left.double() @ shifted(metric, matrix.right)
    result = matrix.double() * metric.isotropic
    scale = metric.scale if isinstance(metric, WideMetric) else 1.0
    if metric.matrix is not None:
        return result + (matrix.to(metric.matrix.dtype) @ metric.matrix).double() * scale
    if metric.rows is not None:
        rows = metric.rows
        result += ((matrix.to(rows.dtype) @ rows.mT) @ rows).double() * scale
    if isinstance(metric, WideMetric) and metric.diagonal is not None:
        result += matrix.double() * metric.diagonal.double() * scale
    return result
