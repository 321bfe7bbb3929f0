"""Isotropic merging: a flat spectrum on the subspace that the experts share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from eutectic.linalg.polar import Support, polar
from eutectic.linalg.svd import default_tolerance, thin_svd
from eutectic.methods.registry import Context, Parameters, register

PAPER = "No task left behind: isotropic model merging, arXiv 2502.04959"


@dataclass(frozen=True, kw_only=True)
class IsoCParameters(Parameters):
    """Parameters of `iso_c`.

    Attributes:
        support: "numerical" flattens the singular values above `rank_tolerance`; "full" all.
        rank_tolerance: fraction of the largest singular value; None: eps · max(out, in).
    """

    support: Support = "numerical"
    rank_tolerance: Annotated[float, Ge(0), Lt(1)] | None = None


@dataclass(frozen=True, kw_only=True)
class IsoCtsParameters(IsoCParameters):
    """Parameters of `iso_cts`.

    Attributes:
        common_fraction: f, the share of the spectrum given to the common subspace.
        support: as in `iso_c`.
        rank_tolerance: as in `iso_c`.
    """

    common_fraction: Annotated[float, Gt(0), Le(1)] = 0.8


def _by_count(to_8: float, to_14: float, beyond: float):
    return lambda count: to_8 if count <= 8 else to_14 if count <= 14 else beyond


@register(
    "iso_c",
    family="isotropic",
    summary="Sum of the task matrices with its spectrum made flat.",
    paper=PAPER,
    parameters=IsoCParameters,
    laws={"permutation", "homogeneous", "zero", "rotation"},
    workspace=4.0,
    default_scale=_by_count(1.3, 1.0, 0.9),
)
def iso_c(deltas: Tensor, parameters: IsoCParameters, context: Context) -> Tensor:
    """Return mean(S)·U Vᵀ of the weighted sum of the deltas."""
    total = context.weigh(deltas).sum(0)
    flat = polar(
        total,
        support=parameters.support,
        rank_tolerance=parameters.rank_tolerance,
        precision=context.precision,
    )
    return flat.factor * flat.mean_singular_value


@register(
    "iso_cts",
    family="isotropic",
    summary="Iso-C on the common subspace, and a few directions of each task beside it.",
    paper=PAPER,
    parameters=IsoCtsParameters,
    laws={"permutation", "homogeneous", "zero", "rotation"},
    workspace=8.0,
    default_scale=_by_count(1.5, 1.2, 1.1),
)
def iso_cts(deltas: Tensor, parameters: IsoCtsParameters, context: Context) -> Tensor:
    """Return the flat merge of the common directions and of each task's own directions."""
    deltas = context.weigh(deltas)
    tolerance = parameters.rank_tolerance
    if tolerance is None:
        tolerance = default_tolerance(deltas.dtype, deltas.shape[1:])
    numerical = parameters.support == "numerical"
    total = thin_svd(deltas.sum(0))
    rank = int((tolerance * total.S[0] < total.S).sum()) if numerical else len(total.S)
    c, k = split_spectrum(rank, parameters.common_fraction, len(deltas))
    common = total.first(c)
    blocks = []
    for delta in deltas.double():
        rest = thin_svd(delta - common.U @ (common.U.mT @ delta)).first(k)
        if numerical and k:
            floor = tolerance * max(float(rest.S[0]), float(delta.norm()) / min(delta.shape) ** 0.5)
            rest = rest.first(int((rest.S > floor).sum()))
        blocks.append(rest)
    blocks.append(common)
    U = polar(torch.cat([b.U for b in blocks], 1), support=parameters.support).factor
    V = polar(torch.cat([b.V for b in blocks], 1), support=parameters.support).factor
    S = torch.cat([b.S for b in blocks])
    mean = float(S.mean()) if len(S) else 0.0
    return (U @ V.mT).to(deltas.dtype) * mean


def split_spectrum(rank: int, common_fraction: float, experts: int) -> tuple[int, int]:
    """Return c and k: how many common directions, and how many of each expert's own."""
    own = rank - int(rank * common_fraction)
    k = min(round(own / experts), rank // experts)
    return rank - k * experts, k
