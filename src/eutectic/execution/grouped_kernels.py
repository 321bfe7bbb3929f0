"""A convolution of several groups: so many matrices, each with statistics of its own inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eutectic.linalg.lowrank import LowRankStack
from eutectic.methods import Context
from eutectic.types import LayerStatistics

# Takes which rows they are, their deltas `[T, rows, in]` and context; returns result and record.
OfRows = Callable[[slice, Tensor, Context], tuple[Tensor, Mapping[str, Any]]]


def by_groups(
    deltas: Tensor | LowRankStack, context: Context, groups: int, of_rows: OfRows
) -> tuple[Tensor, dict[str, Any]]:
    """Return what a function makes of each group of a kernel `[out, in]`, and its record.

    The record has how many groups there are, and of each number the largest of all groups.
    """
    deltas = deltas.dense() if isinstance(deltas, LowRankStack) else deltas
    results: list[Tensor] = []
    record: dict[str, Any] = {}
    for index, rows in enumerate(group_rows(deltas.shape[1], groups)):
        own = replace(
            context,
            tensor=f"{context.tensor}[{index}]",
            base=None if context.base is None else context.base[rows],
            initial=None if context.initial is None else context.initial[rows],
            statistics=group_statistics(context.statistics, index, rows, groups),
        )
        result, told = of_rows(rows, deltas[:, rows], own)
        results.append(result)
        for key, value in told.items():
            known = record.setdefault(key, value)
            record[key] = max(known, value) if isinstance(value, (int, float)) else known
    return torch.cat(results), {"groups": groups, **record} if record else {}


def group_rows(rows: int, groups: int) -> Iterator[slice]:
    """Yield the rows of every group."""
    height = rows // groups
    for start in range(0, rows, height):
        yield slice(start, start + height)


def group_statistics(
    entries: tuple[LayerStatistics | None, ...] | None, index: int, rows: slice, groups: int
) -> tuple[LayerStatistics | None, ...] | None:
    """Return what the experts' statistics say of one group: its Gram, and its outputs' part."""
    if entries is None:
        return None
    return tuple(None if e is None else _of_group(e, index, rows, groups) for e in entries)


def _of_group(entry: LayerStatistics, index: int, rows: slice, groups: int) -> LayerStatistics:
    gram, total, fisher = entry.gram, entry.input_sum, entry.fisher_diagonal
    outer, factor = entry.output_gradient_gram, entry.output_gradient_factor
    rest = entry.output_gradient_diagonal
    return replace(
        entry,
        gram=None if gram is None else gram[index],
        input_sum=None if total is None else total.view(groups, -1)[index],
        output_gradient_gram=None if outer is None else outer[rows, rows],
        output_gradient_factor=None if factor is None else factor[:, rows],
        output_gradient_diagonal=None if rest is None else rest[rows],
        fisher_diagonal=None if fisher is None else fisher[rows],
    )
