"""Matching in the core space of thin factors."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eutectic.linalg.core import CoreSpace, beyond, core_space, stays_thin
from eutectic.linalg.lowrank import LowRankStack
from eutectic.methods.grams import projected
from eutectic.methods.registry import Context, MethodFunction
from eutectic.types import Merged


def core_of(
    deltas: LowRankStack, context: Context, members: Sequence[int], grams: bool
) -> CoreSpace | None:
    """Return the core that holds all iterates of a system, None where there is no small one.

    Args:
        deltas: T products of thin factors.
        context: its statistics, where the system has Grams.
        members: experts that take part; the rows of their Grams widen V.
        grams: whether the system has Grams: all of them have to be rows alone.
    """
    if not deltas.rank:
        return None
    rows: list[Tensor] = []
    for t in members if grams else ():
        entry = context.statistics[t] if context.statistics is not None else None
        if entry is None or entry.gram_factor is None or not entry.count:
            return None
        if entry.gram is not None or entry.gram_diagonal is not None:
            return None
        rows.append(entry.gram_factor.to(deltas.device))
    rows = beyond(deltas, rows)
    return core_space(deltas, rows) if stays_thin(deltas, sum(map(len, rows))) else None


def in_core(
    function: MethodFunction,
    space: CoreSpace,
    parameters: Any,
    context: Context,
    dtype: torch.dtype,
) -> Merged:
    """Return what a method makes of the cores and the Grams between V, multiplied out."""
    entries = context.statistics
    if entries is not None:
        entries = tuple(None if e is None else projected(e, space.right) for e in entries)
    inner = replace(context, statistics=entries, base=None)
    result = function(space.cores, parameters, inner)
    merged = result if isinstance(result, Merged) else Merged(result)
    # Inputs that no row reaches are those of the core, not of the layer.
    record = {key: value for key, value in merged.record.items() if key != "dead_inputs"}
    return Merged(space.expand(merged.delta).dense().to(dtype), {**record, "core": True})
