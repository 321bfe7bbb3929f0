"""The records that rooms share. Plain data; no behaviour beyond checking and small derivations."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


class Treatment(str, Enum):
    """What becomes of one tensor; decided once, by the planner."""

    MATRIX = "matrix"  # a linear map [out, in]: the method's matrix rule
    VECTOR = "vector"  # biases, norms: mean of the deltas unless the method says otherwise
    EMBEDDING = "embedding"  # lookup tables: as vectors, spectral methods must not flatten them
    HEAD = "head"  # per-task output layer: kept per expert
    COPY = "copy"  # taken from the base
    CONV = "conv"  # kernels: as vectors, or flattened to [out, in·k·k] where asked


# Grams that may come in rows and a diagonal.
FACTORED = frozenset({"gram", "pooled_gram", "output_gradient_gram"})


def gram_names(statistic: str) -> tuple[str, str, str]:
    """Return how a sum of outer products is called: dense, as a factor, and its diagonal rest.

    Of other statistics only the first name is ever used.
    """
    stem = statistic.removesuffix("_gram")
    return statistic, f"{stem}_factor", f"{stem}_diagonal"


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStatistics:
    """What one expert's proxy data say about one parameter. Sums, never divided.

    For a linear map with weight `[out, in]`, inputs X `[n, in]` (one row per unmasked token) and
    gradients Y `[n, out]` of the log-likelihood with respect to the layer's outputs:

    Attributes:
        gram: A = XᵀX `[in, in]`, uncentred. None when `gram_factor` holds it instead. Of a
            convolution X are the patches that its kernels see; where it has several groups A is
            `[groups, in, in]`, and `input_sum` `[groups·in]`. Of a transposed one X are single
            positions of its input, and Y the gradients of the patches that they make.
        count: n, the number of tokens summed into `gram`.
        output_gradient_gram: H = YᵀY `[out, out]`. None when `output_gradient_factor` holds it.
        fisher_diagonal: Σ over examples of the squared gradient, in the parameter's shape.
        input_sum: Σx `[in]`; `input_sum / count` is the prototype of arXiv 2606.19164.
        pooled_sum: Σ over samples of the per-sample mean input `[in]`.
        pooled_gram: Σ over samples of the outer product of the per-sample mean input `[in, in]`.
            None when `pooled_factor` holds it.
        sample_count: number of samples (sequences, images) behind the pooled sums. A layer that is
            called twice for an example counts it twice, one that is passed by does not count it.
        gram_factor: F `[k, in]` with A = FᵀF + diag(`gram_diagonal`): fewer rows than a Gram when
            few tokens were seen, or a truncated form for wide layers.
        gram_diagonal: the diagonal remainder `[in]` of a truncated factor.
        pooled_factor, pooled_diagonal: the same of `pooled_gram`.
        output_gradient_factor, output_gradient_diagonal: the same of `output_gradient_gram`.
        core_gram: A·XᵀX·Aᵀ `[R, R]` in place of the Gram, A the rows of several adapters; see
            `statistics.core_rows`.
        core_rows: these A `[R, in]`, the same tensor for all experts. With them `core_gram` stands
            for the Gram within the span of the rows, A⁺·`core_gram`·(A⁺)ᵀ.
        block_fisher: for a vector parameter, Σ over examples of g gᵀ `[d, d]`.
        examples: number of examples behind a Fisher, however often each reached the layer; 0 where
            `sample_count` says it.
    """

    gram: Tensor | None = None
    count: int = 0
    output_gradient_gram: Tensor | None = None
    fisher_diagonal: Tensor | None = None
    input_sum: Tensor | None = None
    pooled_sum: Tensor | None = None
    pooled_gram: Tensor | None = None
    sample_count: int = 0
    gram_factor: Tensor | None = None
    gram_diagonal: Tensor | None = None
    pooled_factor: Tensor | None = None
    pooled_diagonal: Tensor | None = None
    output_gradient_factor: Tensor | None = None
    output_gradient_diagonal: Tensor | None = None
    block_fisher: Tensor | None = None
    core_gram: Tensor | None = None
    core_rows: Tensor | None = None
    examples: int = 0

    def __repr__(self) -> str:
        """Show shapes and counts, no values."""
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {n: v for n, v in told.items() if v is not None and not isinstance(v, Tensor) and v}
        shapes = {n: list(v.shape) for n, v in told.items() if isinstance(v, Tensor)}
        shown = {n: {**kept, **shapes}[n] for n in told if n in kept or n in shapes}
        return f"LayerStatistics({', '.join(f'{n}={v}' for n, v in shown.items())})"

    def has(self, statistic: str) -> bool:
        """Tell whether a statistic is there; a Gram in any form."""
        if statistic == "gram" and self.core_gram is not None and self.core_rows is not None:
            return True
        dense, factor, _ = gram_names(statistic)
        return getattr(self, dense) is not None or getattr(self, factor, None) is not None

    def to(self, device: str) -> LayerStatistics:
        """Return the same sums on a device."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) for k, v in held.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def dense_gram(self, dtype: torch.dtype = torch.float64) -> Tensor | None:
        """Return A `[in, in]` in `dtype` whichever way it is stored, or None if there is none."""
        return self.dense("gram", dtype)

    def dense(self, statistic: str, dtype: torch.dtype = torch.float64) -> Tensor | None:
        """Return a Gram, one of `FACTORED`, as a matrix in `dtype`, or None if there is none."""
        matrix, factor, diagonal = (getattr(self, name) for name in gram_names(statistic))
        if matrix is not None:
            return matrix.to(dtype)
        if factor is None:
            return None
        wide = factor.to(dtype)
        gram = wide.T @ wide
        if diagonal is not None:
            gram.diagonal().add_(diagonal.to(dtype))
        return gram


@runtime_checkable
class Statistics(Protocol):
    """The statistics of one expert, of which little need be in memory at once.

    A statistics file keeps to this by itself; `as_statistics` makes it of a plain mapping.
    """

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the statistics say about themselves; empty where they say nothing."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the checkpoint that they were collected on, None where unknown."""
        ...

    @property
    def samples(self) -> Mapping[str, Tensor]:
        """A few values of each parameter that they were collected with, empty where unknown."""
        ...

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the parameters that have an entry."""
        ...

    def __contains__(self, name: object, /) -> bool:
        """Tell whether a parameter has an entry."""
        ...

    def has(self, name: str, statistic: str) -> bool:
        """Tell, without reading, whether a parameter has a statistic (named as for `read`)."""
        ...

    def read(
        self, name: str, only: Collection[str] | None = None, *, in_rows: bool = False
    ) -> LayerStatistics:
        """Return the statistics of one parameter: counts, and those named in `only` (None: all).

        With `in_rows`, all Grams that are kept in rows come so: no matrix is formed. More than
        asked for may be returned where nothing has to be read.
        """
        ...

    def read_bytes(self, name: str, only: Collection[str]) -> int:
        """Return how many bytes `read` takes from a file."""
        ...


@dataclass(frozen=True, eq=False)
class StatisticsInMemory:
    """A mapping of parameter name -> `LayerStatistics` with the surface of a statistics file."""

    entries: Mapping[str, LayerStatistics]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str | None = None
    samples: Mapping[str, Tensor] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def has(self, name: str, statistic: str) -> bool:
        """Tell whether a parameter has a statistic."""
        return name in self.entries and self.entries[name].has(statistic)

    def read(
        self, name: str, only: Collection[str] | None = None, *, in_rows: bool = False
    ) -> LayerStatistics:
        """Return the whole entry as it is: it is in memory anyway."""
        del only, in_rows
        return self.entries[name]

    def read_bytes(self, name: str, only: Collection[str]) -> int:
        """Return 0: nothing is read."""
        return 0


def as_statistics(given: Statistics | Mapping[str, LayerStatistics]) -> Statistics:
    """Return statistics as they are, or a plain mapping with their surface."""
    return given if isinstance(given, Statistics) else StatisticsInMemory(given)


@dataclass(frozen=True)
class Merged:
    """A merged delta with what the method has to say about it (residual curve, ridge used …).

    `record` holds JSON-serialisable values only; the run report stores it under the tensor's name.
    """

    delta: Tensor
    record: dict[str, Any] = field(default_factory=dict)
