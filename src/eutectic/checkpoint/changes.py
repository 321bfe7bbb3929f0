"""Changes that adapters make in other forms than one product: computed when they are read.

A `Change` gives flat ranges of Δ in the base's layout, like `Expert.delta`. What needs a whole
matrix computes it once for ranges read one after the other, and keeps it until the last.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from eutectic.checkpoint.arranged import Arranged
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.peft_kinds.formulas import Formula
from eutectic.errors import CheckpointError

if TYPE_CHECKING:
    from eutectic.checkpoint.reader import TensorSource


class Change(Protocol):
    """How an adapter changes one tensor of the base."""

    @property
    def held_bytes(self) -> int:
        """Bytes that reading it holds, beside what is returned."""
        ...

    @property
    def zero(self) -> bool:
        """Whether it is certain, from a part of it, that nothing changes."""
        ...

    @property
    def inner_rank(self) -> int | None:
        """The inner size of the products that it is, the largest in a stack; None of others."""
        ...

    def delta(self, start: int, stop: int, base: Tensor, dtype: torch.dtype) -> Tensor:
        """Return elements [start, stop) of Δ in `dtype`; `base` is that range of W₀ in it."""
        ...


class BaseWeights:
    """The base, which some changes are computed from; opened when it is asked for first."""

    def __init__(
        self,
        opened: "Callable[[], TensorSource] | None",
        source: "TensorSource | None" = None,
    ) -> None:
        """Take what opens the base, or the open base, which is then somebody else's to close."""
        self._open = opened
        self._source: TensorSource | None = source
        self._lock = threading.Lock()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor of the base, 1-D in its dtype."""
        with self._lock:
            if self._source is None:
                if self._open is None:
                    raise CheckpointError(
                        f"'{name}': this adapter's change is computed from the base's weights, "
                        "which are not in files here.\nName a base in files."
                    )
                self._source = self._open()
        return self._source.read(name, start, stop)

    def close(self) -> None:
        """Release files."""
        with self._lock:
            if self._source is not None and self._open is not None:
                self._source.close()
                self._source = None


class Kept:
    """The last block that a thread computed, for ranges read one after the other."""

    def __init__(self) -> None:
        self._local = threading.local()

    def get(self, key: object, first: bool, last: bool, compute: Callable[[], Tensor]) -> Tensor:
        """Return a flat block; it is kept from its first range on, until its last."""
        kept = getattr(self._local, "block", None)
        if kept is not None and kept[0] == key:
            values = kept[1]
        else:
            self._local.block = None  # or two would be held
            values = compute()
            if first and not last:
                self._local.block = (key, values)
        if last:
            self._local.block = None
        return values


def kept() -> Kept:
    """Return a place for one block per thread."""
    return Kept()


@dataclass(frozen=True, eq=False)
class WholeChange:
    """A change that is computed as one matrix, from an adapter's parts and maybe from W₀."""

    name: str  # of the base's tensor
    source: "TensorSource"  # the adapter
    parts: Mapping[str, TensorEntry]
    formula: Formula
    shape: tuple[int, ...]  # of the base's tensor
    transposed: bool  # the base keeps [in, out]
    base: BaseWeights
    kept: Kept
    whole: TensorEntry | None = None  # what the adapter has in full instead of W₀

    @property
    def held_bytes(self) -> int:
        """Bytes of the matrices that the formula holds at once."""
        size = torch.Size(self.shape).numel() * torch.float32.itemsize
        return int(size * self.formula.matrices)

    @property
    def zero(self) -> bool:
        """Not known without computing it."""
        return False

    @property
    def inner_rank(self) -> int | None:
        """None: it is no product of stored factors."""
        return None

    def delta(self, start: int, stop: int, base: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a range of Δ; the whole is computed for the first one."""
        count = torch.Size(self.shape).numel()
        given = base if (start, stop) == (0, count) and self.whole is None else None

        def compute() -> Tensor:
            return self._compute(given, dtype)

        values = self.kept.get((self.name, dtype), start == 0, stop == count, compute)
        change = values[start:stop].clone()
        if self.whole is None:
            return change
        return change.add_(self.source.read(self.whole.name, start, stop).to(dtype)).sub_(base)

    def _compute(self, given: Tensor | None, dtype: torch.dtype) -> Tensor:
        parts = {part: self._read(entry, dtype) for part, entry in self.parts.items()}
        flat = given
        if self.whole is not None:
            flat = self.source.read(self.whole.name)
        elif flat is None and self.formula.on_base:
            flat = self.base.read(self.name)
        elif flat is None:
            flat = torch.zeros(1, dtype=dtype).expand(torch.Size(self.shape).numel())
        matrix = flat.to(dtype).view(self.shape[0], -1)
        try:
            change = self.formula.compute(parts, matrix.mT if self.transposed else matrix)
        except (RuntimeError, IndexError, ValueError) as error:
            raise CheckpointError(
                f"'{self.name}': the adapter's parts make no change of this tensor "
                f"({str(error).splitlines()[0]}).\n"
                "The adapter belongs to another base, or its file is damaged."
            ) from error
        change = change.to(dtype)
        return (change.mT if self.transposed else change).contiguous().view(-1)

    def _read(self, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
        values = self.source.read(entry.name).view(entry.shape)
        return values if not entry.dtype.is_floating_point else values.to(dtype)


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of a table that an adapter trained alone: they replace the base's."""

    source: "TensorSource"
    rows: TensorEntry  # [n, width]
    tokens: tuple[int, ...]  # the row of the base that each replaces, ascending
    places: tuple[int, ...]  # where each is in `rows`
    width: int
    whole: TensorEntry | None = None  # the table as the adapter has it, where it is stored in full

    @property
    def held_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * 8

    @property
    def zero(self) -> bool:
        """Not known without comparing."""
        return False

    @property
    def inner_rank(self) -> int | None:
        """None: it is no product of stored factors."""
        return None

    def same_as(self, other: "TokenRows") -> bool:
        """Tell whether both replace the same rows by the same values, and nothing else."""
        if (self.tokens, self.places, self.width) != (other.tokens, other.places, other.width):
            return False
        if self.whole is not None or other.whole is not None:
            return False
        return torch.equal(*(held.source.read(held.rows.name) for held in (self, other)))

    def delta(self, start: int, stop: int, base: Tensor, dtype: torch.dtype) -> Tensor:
        """Return W_t − W₀ in rows that were trained; elsewhere 0, or what the full table says."""
        if self.whole is None:
            change = torch.zeros_like(base, dtype=dtype)
        else:
            change = self.source.read(self.whole.name, start, stop).to(dtype).sub_(base)
        width = self.width
        for token, place in zip(self.tokens, self.places, strict=True):
            low, high = max(start, token * width), min(stop, (token + 1) * width)
            if low >= high:
                continue
            shift = (place - token) * width
            values = self.source.read(self.rows.name, low + shift, high + shift).to(dtype)
            change[low - start : high - start] = values - base[low - start : high - start]
        return change


@dataclass(frozen=True, eq=False)
class PackedProducts:
    """Products of thin factors for each matrix of a stack, whose factors lie side by side.

    A is `[E·r, in]`, one expert's rows after another's; B is `[out, E·r]`, its columns in turns.
    """

    name: str
    source: "TensorSource"
    a: TensorEntry
    b: TensorEntry
    experts: int
    scaling: float
    transposed: bool  # the stack keeps [in, out]
    kept: Kept
    kept_b: Kept  # every matrix takes a part of B, which does not lie in a row

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape of one matrix as the stack keeps it."""
        out, width = self.b.shape[0], self.a.shape[1]
        return (width, out) if self.transposed else (out, width)

    @property
    def held_bytes(self) -> int:
        """Bytes of both factors and one matrix."""
        rows, columns = self.matrix_shape
        return 4 * (self.a.numel + self.b.numel + 2 * rows * columns)

    @property
    def zero(self) -> bool:
        """Whether a factor is zero."""
        return not bool(self.source.read(self.b.name).any())

    @property
    def inner_rank(self) -> int | None:
        """The rank of one matrix's factors."""
        return self.a.shape[0] // self.experts

    def delta(self, start: int, stop: int, base: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a range of the stack, whose matrices are computed one by one."""
        return self.read(start, stop, dtype)

    def read(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return a range of the stack."""
        rows, columns = self.matrix_shape
        size = rows * columns
        out = torch.empty(stop - start, dtype=dtype)
        for number in range(start // size, -(-stop // size) if stop > start else 0):
            low, high = max(start, number * size), min(stop, (number + 1) * size)
            span = (low - number * size, high - number * size)

            def compute(number: int = number) -> Tensor:
                return self._matrix(number, dtype)

            values = self.kept.get(
                (self.name, number, dtype), span[0] == 0, span[1] == size, compute
            )
            out[low - start : high - start] = values[span[0] : span[1]]
        return out

    def factors(self, number: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return (L, R) of one matrix with Δ = L·R, as the stack keeps it."""
        rank = self.a.shape[0] // self.experts
        width = self.a.shape[1]
        first = number * rank * width
        a = self.source.read(self.a.name, first, first + rank * width).view(rank, width).to(dtype)
        b = self.kept_b.get(self.b.name, True, False, lambda: self.source.read(self.b.name))
        b = b.view(self.b.shape[0], rank, self.experts)[:, :, number].to(dtype) * self.scaling
        return (a.mT, b.mT) if self.transposed else (b, a)

    def _matrix(self, number: int, dtype: torch.dtype) -> Tensor:
        left, right = self.factors(number, dtype)
        return (left @ right).contiguous().view(-1)


@dataclass(frozen=True, eq=False)
class ArrangedChange:
    """A change of a tensor that the base packs otherwise than the model that was adapted."""

    name: str
    changes: Arranged  # over `ChangedModel`

    @property
    def held_bytes(self) -> int:
        """Bytes of two matrices."""
        rows, columns = self.changes.views[self.name].shape
        return 2 * 8 * rows * columns

    @property
    def zero(self) -> bool:
        """Not known without computing it."""
        return False

    @property
    def inner_rank(self) -> int | None:
        """The ranks of the products that a matrix is made of, together."""
        source = self.changes.source
        assert isinstance(source, ChangedModel)
        matrices = self.changes.views[self.name].matrices
        return max(sum(map(source.inner_rank, {p.key for p in pieces})) for pieces in matrices)

    def delta(self, start: int, stop: int, base: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a range of Δ."""
        return self.changes.read(self.name, start, stop).to(dtype)


class ChangedModel:
    """An adapter's changes as the tensors of a checkpoint, in the layout of the adapted model."""

    is_delta = False
    notes = ()

    def __init__(self, changes: Mapping[str, PackedProducts | None], shapes: Sequence[TensorEntry]):
        """Show changes by the names in `shapes`; None where a tensor is not changed."""
        self._changes = changes
        self.entries: Mapping[str, TensorEntry] = {e.name: e for e in shapes}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of a change, in float64."""
        stop = self.entries[name].numel if stop is None else stop
        change = self._changes[name]
        if change is None:
            return torch.zeros(stop - start, dtype=torch.float64)
        return change.read(start, stop, torch.float64)

    def inner_rank(self, name: str) -> int:
        """Return the rank of each matrix of a change; 0 where nothing changes."""
        change = self._changes[name]
        return 0 if change is None else change.inner_rank or 0

    def fingerprint(self) -> str:
        """Return nothing: the adapter's file has the identity."""
        return ""

    def identity(self) -> list[tuple[str, int, int]]:
        """Return nothing: the adapter's file has the identity."""
        return []

    def close(self) -> None:
        """Do nothing: the files are the adapter's."""


def entry_of_change(name: str, shape: tuple[int, ...], like: TensorEntry) -> TensorEntry:
    """Return how a computed tensor looks in a table."""
    entry = replace(like, name=name, dtype=torch.float64, shape=shape, offset=-1)
    return replace(entry, nbytes=entry.numel * torch.float64.itemsize)
