"""Factors between layers: one for each matrix that a method saw, be it a whole tensor or a part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from eutectic.conventions import layer_group
from eutectic.execution.tensor_values import as_map
from eutectic.methods import Method
from eutectic.planning.tensor_plan import TensorPlan


def matrix_name(planned: TensorPlan, block: int, part: str) -> str:
    """Return the name under which a matrix is compared with others.

    A stack's matrices are numbered as layers are, so that they are like layers, as they would be
    with a tensor each. Parts of a fused matrix keep their brackets: they are different layers.
    """
    return planned.name + (f".{block}" if planned.layout.stacked else "") + part


def layer_factors(method: Method, norms: Mapping[str, float], parameters: Any) -> dict[str, float]:
    """Return the factor of every merged matrix by a method that compares like layers.

    `norms` are the Frobenius norms of all matrices that the method merged, by name.
    """
    assert method.finish is not None
    groups: dict[str, list[str]] = {}
    for name in norms:
        groups.setdefault(layer_group(name), []).append(name)
    factors: dict[str, float] = {}
    for names in groups.values():
        own = method.finish([norms[name] for name in names], parameters)
        factors |= zip(names, own, strict=True)
    return factors


def matrix_norms(planned: TensorPlan, block: int, delta: Tensor) -> dict[str, float]:
    """Return the Frobenius norms of the matrices in one block of a tensor, flat as in the file."""
    matrix = as_map(delta, planned)
    if matrix.ndim == 0:
        return {matrix_name(planned, block, ""): abs(float(matrix))}
    return {
        matrix_name(planned, block, part): float(
            torch.linalg.vector_norm(matrix[rows], dtype=torch.float64)
        )
        for part, rows in planned.row_parts(len(matrix))
    }


def range_factor(
    planned: TensorPlan, factors: Mapping[str, float], start: int, stop: int
) -> float | Tensor:
    """Return the factor of a flat range inside one block: a number, or one per entry."""
    _, size = planned.blocks
    block = start // max(size, 1)
    if not planned.layout.split:
        return factors.get(matrix_name(planned, block, ""), 1.0)
    names = [matrix_name(planned, block, part) for part, _ in planned.row_parts(0)]
    if not factors.keys() & set(names):
        return 1.0
    own = torch.tensor([factors.get(name, 1.0) for name in names], dtype=planned.compute)
    per_row = own.repeat_interleave(torch.tensor(planned.layout.split))
    entries = torch.arange(start - block * size, stop - block * size)
    columns = planned.matrix_shape[-1]
    return per_row[entries % columns if planned.layout.transpose else entries // columns]


def factors_of(planned: TensorPlan, factors: Mapping[str, float]) -> dict[str, float]:
    """Return the factors of one tensor's matrices."""
    names = (name for _, name in _matrices(planned)) if factors else ()
    return {name: factors[name] for name in names if name in factors}


def with_factors(
    record: Mapping[str, Any], planned: TensorPlan, factors: Mapping[str, float]
) -> dict[str, Any]:
    """Return what a method reported of a tensor, with the factor of each of its matrices."""
    found = dict(record)
    for label, name in _matrices(planned):
        if name in factors:
            told = {"layer_factor": factors[name]}
            found |= {label: {**found.get(label, {}), **told}} if label else told
    return found


def _matrices(planned: TensorPlan) -> Iterator[tuple[str, str]]:
    """Yield (label in records, name) of every matrix of a tensor."""
    blocks, _ = planned.blocks
    for block in range(blocks):
        for part, _ in planned.row_parts(0):
            suffix = f"[{block}]" if blocks > 1 else ""
            yield suffix + part, matrix_name(planned, block, part)
