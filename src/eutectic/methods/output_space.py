"""Matching of thin factors where the inputs' own axes count: in the outputs that they reach."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from eutectic.linalg.core import THIN, output_space
from eutectic.linalg.lowrank import LowRankStack
from eutectic.methods.registry import Context, MethodFunction
from eutectic.types import Merged


def reached(deltas: LowRankStack, context: Context, members: Sequence[int]) -> bool:
    """Tell whether few outputs are reached, and a Gram has a diagonal, which no core holds."""
    entries = context.statistics or ()
    beside = any(
        e is not None and e.gram_diagonal is not None for e in (entries[t] for t in members)
    )
    return beside and 0 < deltas.rank <= THIN * deltas.shape[1]


def between_outputs(
    function: MethodFunction, deltas: LowRankStack, parameters: Any, context: Context
) -> Merged:
    """Return U·f(UᵀΔ_1 … UᵀΔ_T), U an orthonormal basis `[out, m]` of what all Δ_t reach.

    Operators X -> X·A_t, and the Frobenius norm, do not see U. Cost: that of `[T, m, in]`, with
    m = Σ r_t, in float64, and one product with U.
    """
    left, inner = output_space(deltas)
    result = function(inner, parameters, replace(context, base=None))
    merged = result if isinstance(result, Merged) else Merged(result)
    return Merged((left @ merged.delta.double()).to(deltas.dtype), merged.record)
