"""Statistics that cannot be are refused before any method computes with them.

A second moment is symmetric, has no negative eigenvalue, and its counts and sums agree:
(Σx)² ≤ n·Σx² entry by entry. What breaks that was damaged, cut, or made for something else, and a
root or an inverse of it is NaN, or a plausible wrong number.
"""

import math
from collections.abc import Collection
from dataclasses import fields

import torch
from torch import Tensor

from eutectic.errors import MethodError, NumericalError
from eutectic.linalg import lapack
from eutectic.methods.linear import finite
from eutectic.methods.registry import Context
from eutectic.types import LayerStatistics, gram_names

_ROUNDOFF = 16  # rounding errors of a sum that are allowed, relative to the Gram's trace
_TILE = 256
_SYMMETRY = 1e-4  # of the largest diagonal entry
_AGAIN = "Collect the statistics of this expert again, in float32."


def check_statistics(needs: Collection[str], shape: tuple[int, ...], context: Context) -> None:
    """Refuse what a method would read of the experts' statistics, where it cannot be.

    Args:
        needs: the statistics that the method reads; "base" is none.
        shape: of the tensor, `[out, in]` for a matrix.
        context: names and statistics. Absent entries are the method's business.

    Raises:
        MethodError: another shape than the tensor's, or no floating-point numbers.
        NumericalError: NaN or Inf, a negative sum of squares, a Gram that is not symmetric or has a
            negative eigenvalue beyond rounding, or a count that contradicts the sums.

    Cost: one Cholesky factor for each Gram, in the dtype that it is stored in.
    """
    for name, entry in zip(context.experts, context.statistics or (), strict=False):
        if entry is not None:
            where = f"{context.tensor or 'the tensor'}, expert '{name}'"
            for need in sorted(set(needs) - {"base"}):
                _check_need(need, entry, shape, where)


def _check_need(need: str, entry: LayerStatistics, shape: tuple[int, ...], where: str) -> None:
    if need == "fisher_diagonal":
        _check_squares(entry.fisher_diagonal, need, shape, where)
        return
    if len(shape) != 2 and need != "block_fisher":
        return  # Grams are for matrices; of anything else a method makes no use of them
    size = {"output_gradient_gram": shape[0], "block_fisher": math.prod(shape)}.get(need, shape[-1])
    _, factor_name, diagonal_name = gram_names(need)
    matrix = getattr(entry, need)
    factor, diagonal = (getattr(entry, name, None) for name in (factor_name, diagonal_name))
    if matrix is not None:
        _check_form(matrix, need, (size, size), where)
        _check_gram(matrix, need, where)
    if factor is not None:
        _check_form(factor, factor_name, (len(factor), size), where)
    _check_squares(diagonal, diagonal_name, (size,), where)
    if need == "gram":
        if entry.core_rows is not None and entry.core_gram is not None:
            rows = len(entry.core_rows)
            _check_form(entry.core_rows, "core_rows", (rows, size), where)
            _check_form(entry.core_gram, "core_gram", (rows, rows), where)
            _check_gram(entry.core_gram, "core_gram", where)
        _check_counts(entry, matrix, where)


def _check_form(value: Tensor, name: str, shape: tuple[int, ...], where: str) -> None:
    if tuple(value.shape) != shape:
        raise MethodError(
            f"{where}: {name} has shape {list(value.shape)}, "
            f"the tensor asks for {list(shape)}.\n"
            "The statistics belong to another layer, layout or checkpoint."
        )
    if not value.is_floating_point():
        raise MethodError(
            f"{where}: {name} holds {value.dtype}; sums are floating-point numbers.\n{_AGAIN}"
        )
    if not finite(value):
        raise NumericalError(f"{where}: NaN or Inf in {name}; nothing was merged.\n{_AGAIN}")


def _check_squares(value: Tensor | None, name: str, shape: tuple[int, ...], where: str) -> None:
    if value is not None:
        _check_form(value, name, shape, where)
        _refuse_negative(value, name, where)


def _refuse_negative(value: Tensor, name: str, where: str) -> None:
    if value.numel() and float(value.min()) < 0:
        raise NumericalError(
            f"{where}: {name} has {int((value < 0).sum())} negative sums of squares, down to "
            f"{float(value.min()):.3g}.\n{_AGAIN}"
        )


def _check_gram(matrix: Tensor, name: str, where: str) -> None:
    """Refuse a matrix that is no sum of outer products."""
    _refuse_negative(matrix.diagonal(), f"the diagonal of {name}", where)
    stored = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    trace = float(stored.diagonal().sum(dtype=torch.float64))
    if trace == 0:
        if bool(stored.any()):
            raise NumericalError(f"{where}: {name} has entries beside a zero diagonal.\n{_AGAIN}")
        return
    eps = _ROUNDOFF * torch.finfo(matrix.dtype).eps
    largest = float(stored.diagonal().max())
    apart = _asymmetry(stored)
    if apart > max(_SYMMETRY, eps) * largest:
        raise NumericalError(
            f"{where}: {name} is not symmetric; entries differ by up to {apart:.3g} "
            f"where the largest is {largest:.3g}.\n{_AGAIN}"
        )
    least = max(eps, torch.finfo(torch.float32).eps)
    # The factor in float32 is twice as fast; where its own rounding fails, float64 decides.
    for dtype in dict.fromkeys((stored.dtype, torch.float64)):
        shifted = stored.to(dtype) / trace
        shifted.diagonal().add_(least)
        if lapack.cholesky(shifted) is not None:
            break
    else:
        smallest = float(lapack.eigh(stored.double())[0][-1])
        raise NumericalError(
            f"{where}: {name} has the eigenvalue {smallest:.3g}; no sum of squares has a negative "
            f"one (its trace is {trace:.3g}).\n{_AGAIN}"
        )


def _asymmetry(matrix: Tensor) -> float:
    """Return the largest |a_ij − a_ji|, tile by tile: columns of a whole matrix lie too far apart.

    A quarter of the time at 1536 inputs.
    """
    found, edges = 0.0, range(0, len(matrix), _TILE)
    for i in edges:
        for j in edges[i // _TILE :]:
            one = matrix[i : i + _TILE, j : j + _TILE]
            other = matrix[j : j + _TILE, i : i + _TILE].mT
            found = max(found, float((one - other).abs_().max()))
    return found


def _check_counts(entry: LayerStatistics, gram: Tensor | None, where: str) -> None:
    counts = {f.name: getattr(entry, f.name) for f in fields(entry) if f.type in (int, "int")}
    if wrong := {name: n for name, n in counts.items() if n < 0}:
        raise MethodError(f"{where}: the statistics have negative counts: {wrong}.\n{_AGAIN}")
    if gram is None or entry.input_sum is None or not entry.count:
        return
    _check_form(entry.input_sum, "input_sum", (len(gram),), where)
    squares = entry.input_sum.double().square()
    bound = entry.count * gram.diagonal().double()
    slack = _ROUNDOFF * torch.finfo(gram.dtype).eps * entry.count * float(gram.diagonal().sum())
    if bool((squares > bound * 1.001 + slack).any()):
        raise NumericalError(
            f"{where}: {entry.count} inputs cannot have both the sums and the squares that the "
            f"statistics hold.\n{_AGAIN}"
        )
