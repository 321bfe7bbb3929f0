"""Singular values of task matrices, and what a spectrum says in one number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eutectic.linalg.leading import leading_singular
from eutectic.linalg.lowrank import LowRank
from eutectic.linalg.svd import Triplets, default_tolerance


def significant_triplets(delta: Tensor | LowRank) -> Triplets:
    """Return the singular triplets of Δ that are not rounding: S > eps·max(out, in)·S₁.

    Shapes: `[out, in]` -> U `[out, r]`, S `[r]`, V `[in, r]`, float64. A zero matrix has r = 0.
    Cost: one float64 eigenproblem of the shorter side; of thin factors, of their rank.
    """
    tolerance = default_tolerance(delta.dtype, delta.shape)
    return leading_singular(delta, min(delta.shape), tolerance=tolerance)


def stable_rank(values: Tensor) -> float:
    """Return ‖Δ‖_F² / ‖Δ‖₂² = Σσ² / σ₁² of descending singular values; NaN for zero."""
    if not len(values) or float(values[0]) == 0:
        return math.nan
    return float((values.double() / values[0].double()).square().sum())


def effective_rank(values: Tensor) -> float:
    """Return exp(−Σ p log p) with p = σ/Σσ, the entropy of a spectrum as a rank; NaN for zero.

    r equal singular values give r. Source: The effective rank, Roy and Vetterli, EUSIPCO 2007.
    """
    wide = values.double()
    total = float(wide.sum())
    if total == 0:
        return math.nan
    shares = wide / total
    return math.exp(-float(torch.xlogy(shares, shares).sum()))


def energy(values: Tensor, count: int) -> float:
    """Return Σ_{i≤k} σ_i² / Σσ² of descending singular values, k = `count`; NaN for zero."""
    if not len(values) or float(values[0]) == 0:
        return math.nan
    squares = (values.double() / values[0].double()).square()
    return float(squares[:count].sum() / squares.sum())
