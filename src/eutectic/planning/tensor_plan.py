"""What will be done to one tensor of the output: all that decides its bytes, and nothing else."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch

from eutectic.errors import Note
from eutectic.methods import Post, get_method
from eutectic.methods.matrices import needed
from eutectic.types import Treatment

CHUNK = 1 << 17  # entries of one tensor merged at a time: 8 experts' chunks fit the cache
COPY = "copy"  # in place of a method: the base's values as they are


@dataclass(frozen=True)
class Donor:
    """Rows of a tensor of some checkpoint that stand in for rows which another lacks."""

    owner: str  # "base" or an expert's name
    tensor: str
    row: int  # the first


@dataclass(frozen=True)
class FilledRows:
    """Rows of the output that a source lacks, and that are the mean of some donors' rows there."""

    first: int  # in the output
    count: int
    donors: tuple[Donor, ...]  # none: zeros
    # The mean of the source's own rows before them instead; where it lacks some, of this one's.
    average: bool = False
    behind: Source | None = None


@dataclass(frozen=True)
class RowMap:
    """Which rows of a stored tensor stand where in the output, such as those of a vocabulary."""

    width: int  # entries of one row
    # (first row in the output, first row in the source, number of rows), ascending in the output
    # and disjoint there. Rows of the output that no run covers are not in the source
    runs: tuple[tuple[int, int, int], ...]
    filled: tuple[FilledRows, ...] = ()  # ascending and disjoint too; what stands in such rows

    def ranges(self, start: int, stop: int) -> Iterator[tuple[slice, int, int]]:
        """Yield (place in the range, start, stop in the source) of the covered parts of a range.

        `start` and `stop` are flat positions in the output; the place counts from `start`.
        """
        width = max(self.width, 1)
        position = bisect_right(self.runs, start // width, key=lambda run: run[0])
        for out, own, rows in islice(self.runs, max(position - 1, 0), None):
            if out * width >= stop:
                return
            first, last = max(start, out * width), min(stop, (out + rows) * width)
            if first < last:
                shift = (own - out) * width
                yield slice(first - start, last - start), first + shift, last + shift

    def gaps(self, start: int, stop: int) -> Iterator[tuple[slice, int, FilledRows]]:
        """Yield (place in the range, offset in the rows, rows) of the filled parts of a range."""
        width = max(self.width, 1)
        position = bisect_right(self.filled, start // width, key=lambda rows: rows.first)
        for rows in islice(self.filled, max(position - 1, 0), None):
            if rows.first * width >= stop:
                return
            first = max(start, rows.first * width)
            last = min(stop, (rows.first + rows.count) * width)
            if first < last:
                yield slice(first - start, last - start), first - rows.first * width, rows


@dataclass(frozen=True, slots=True)
class Source:
    """Where one checkpoint keeps its values of a tensor of the output."""

    owner: str  # "base", "initial", or the expert's name
    tensor: str | None  # its name there, in the base's scheme; None: it counts as unchanged
    rows: RowMap | None = None  # which of its rows stand where; None where they are the output's
    weight: float = 1.0
    parameters: Any = None  # the method's for this expert, where they differ from the tensor's
    # part of the tensor ("" for the whole) -> its name in the expert's statistics
    statistics: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Layout:
    """How the file lays out the linear maps `[out, in]` that a method sees."""

    transpose: bool = False  # the file holds [in, out]
    split: tuple[int, ...] = ()  # heights of fused matrices, or empty
    stacked: bool = False  # a stack [E, out, in], merged matrix by matrix
    groups: int = 1  # of a convolution: so many matrices in its rows, with inputs of their own
    whole: bool = False  # the method sees the tensor in its own shape, whatever it is


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output. Whoever holds this and the opened inputs can write its bytes."""

    name: str  # in the output
    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: torch.dtype  # dtype of the arithmetic
    treatment: Treatment
    reason: tuple[Note, ...]  # why it is this treatment and method
    layout: Layout = Layout()  # how its matrices lie in the file
    base: Source | None = None  # None where the base has none, which counts as zero
    like: str = ""  # the base's tensor in whose file it lies, where `base` does not say it
    experts: tuple[Source, ...] = ()  # the experts that take part, in order
    initial: Source | None = None  # where a merged checkpoint that the method starts from keeps it
    method: str = COPY  # the method that merges it, or "copy"
    parameters: Any = None  # the method's checked parameters
    post: Post | None = None  # what follows the merge of its matrices
    scale: float = 1.0
    tunable: bool = False  # α is the recipe's, which a search may choose, not that of a rule
    compared: bool = False  # its matrices wait for the norms of other layers' to be scaled
    seed: int = 0
    seed_name: str = ""  # name that seeds random numbers; a tied tensor shares its partner's
    precision: Literal["fast", "exact"] = "fast"
    nonfinite: Literal["error", "allow"] = "error"
    must_agree: bool = False  # a copied buffer that every expert must hold alike
    # Most directions of the change, to which the experts are brought before they are merged.
    compress: int | None = None
    balance: float = 0.0  # how far their changes are brought to one norm for that
    cut_in_inputs: bool = False  # its factors are those nearest in the outputs, not in ‖Δ‖

    @property
    def why(self) -> str:
        """The reason as a text."""
        return "; ".join(map(str, self.reason))

    @property
    def elements(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def merged(self) -> bool:
        """Whether a method merges it."""
        return self.method != COPY

    @property
    def in_chunks(self) -> bool:
        """Whether it is merged entry by entry, a chunk at a time."""
        plain = self.compress is None and self.post is None
        return self.merged and plain and get_method(self.method).elementwise

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that its method and what follows may ask for."""
        own = needed(get_method(self.method), self.parameters)
        return own if self.post is None else own | self.post.needs

    @property
    def merged_by(self) -> str:
        """The method that merges it, and what follows, in words."""
        return self.method if self.post is None else f"{self.method} + {self.post.name}"

    @property
    def blocks(self) -> tuple[int, int]:
        """How many matrices it stacks, and the entries of one; one unless it is a stack."""
        count = self.shape[0] if self.layout.stacked else 1
        return count, self.elements // max(count, 1)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of one of its matrices, as the file lays it out.

        Tables and convolutions are no linear maps: what merges them sees entries in a row.
        """
        if self.layout.whole:
            return self.shape
        if self.treatment in (Treatment.EMBEDDING, Treatment.CONV):
            return (self.elements,)
        if self.layout.stacked:
            return self.shape[1:]
        if len(self.shape) > 2:
            return (self.shape[0], self.elements // self.shape[0])
        return self.shape

    @property
    def matrix_shapes(self) -> list[tuple[int, int]]:
        """[out, in] of each matrix that a method sees."""
        *_, rows, columns = self.matrix_shape
        groups = self.layout.groups
        if groups > 1:  # one below the other in the file, whichever way round each is
            height = rows // groups
            return [(columns, height) if self.layout.transpose else (height, columns)] * groups
        if self.layout.transpose:
            rows, columns = columns, rows
        return [(height, columns) for height in self.layout.split or (rows,)]

    def row_parts(self, rows: int) -> Iterator[tuple[str, slice]]:
        """Yield (label, rows) of the parts of a fused matrix, or the whole under an empty label."""
        if not self.layout.split:
            yield "", slice(0, rows)
        start = 0
        for part, height in enumerate(self.layout.split):
            yield f"[{part}]", slice(start, start + height)
            start += height


def chunk_entries(planned: TensorPlan, size: int = CHUNK) -> int:
    """Return how many entries are merged at a time: whole rows where the method looks at rows."""
    rows = planned.merged and get_method(planned.method).rows
    width = max(planned.shape[-1], 1) if rows and planned.shape else 1
    return max(size // width, 1) * width
