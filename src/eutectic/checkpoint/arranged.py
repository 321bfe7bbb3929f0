"""Tensors that are made of pieces of other tensors: mixtures packed as the base packs them.

A piece is some rows of a matrix `[out, in]`, wherever and however it is stored. A `View` is a
tensor of the base put together from pieces, matrix by matrix; `Arranged` reads it in flat ranges
like any other tensor, and holds one matrix per thread where axes are exchanged.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eutectic.checkpoint.index import TensorEntry
from eutectic.errors import CheckpointError

if TYPE_CHECKING:
    from eutectic.checkpoint.reader import TensorSource


@dataclass(frozen=True)
class Piece:
    """Rows `take` of a stored matrix, which are rows `put` of the matrix that they are part of."""

    key: str
    start: int  # flat offset of the stored matrix
    shape: tuple[int, int]  # as stored
    turned: bool  # stored as [in, out]
    take: slice
    put: slice


@dataclass(frozen=True)
class View:
    """A tensor as a run of matrices of one shape, each made of pieces."""

    shape: tuple[int, int]  # of one matrix, as the base stores it
    turned: bool  # the base stores [in, out]
    matrices: tuple[tuple[Piece, ...], ...]

    @property
    def keys(self) -> frozenset[str]:
        """The tensors that it is made of."""
        return frozenset(piece.key for pieces in self.matrices for piece in pieces)

    @property
    def straight(self) -> bool:
        """Whether rows of the view are rows of the pieces, one after the other."""
        return not self.turned and not any(
            piece.turned or piece.take.step not in (None, 1) or piece.put.step not in (None, 1)
            for piece in self.matrices[0]
        )


def whole(entry: TensorEntry) -> View:
    """Return a tensor under another name."""
    shape = (1, entry.numel)
    piece = Piece(entry.name, 0, shape, False, slice(0, 1), slice(0, 1))
    return View(shape, False, ((piece,),))


class Arranged:
    """A checkpoint with views beside its own tensors, and without those that the views are made of.

    Has the surface of `CheckpointReader`; safe to share between threads.
    """

    is_delta = False

    def __init__(
        self,
        source: "TensorSource",
        views: Mapping[str, View],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Show `views` by name, with the `shapes` that they have in the base."""
        self.source = source
        self.notes = source.notes
        self.views = views
        used = frozenset[str]().union(*(view.keys for view in views.values()))
        entries = {key: entry for key, entry in source.entries.items() if key not in used}
        for name, view in views.items():
            first = source.entries[view.matrices[0][0].key]
            made = replace(first, name=name, shape=shapes[name], offset=-1)
            entries[name] = replace(made, nbytes=made.numel * made.dtype.itemsize)
        self.entries: Mapping[str, TensorEntry] = entries
        self._kept = threading.local()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of the flattened tensor, as `CheckpointReader.read`."""
        view = self.views.get(name)
        if view is None:
            return self.source.read(name, start, stop)
        entry = self.entries[name]
        stop = entry.numel if stop is None else stop
        if not 0 <= start <= stop <= entry.numel:
            raise ValueError(f"'{name}': range {start}:{stop} outside 0:{entry.numel}")
        size = view.shape[0] * view.shape[1]
        out = torch.empty(stop - start, dtype=entry.dtype)
        if start == stop:
            return out
        for number in range(start // size, -(-stop // size)):
            low, high = max(start, number * size), min(stop, (number + 1) * size)
            span = (low - number * size, high - number * size)
            into = out[low - start : high - start]
            if view.straight:
                self._read_rows(view, number, span, into)
            else:
                into.copy_(self._matrix(name, number, last=span[1] == size)[span[0] : span[1]])
        return out

    def fingerprint(self) -> str:
        """Return the sampled identity of the content as it is stored."""
        return self.source.fingerprint()

    def identity(self) -> list[tuple[str, int, int]]:
        """Return (file, bytes, mtime in ns) of every file read."""
        return self.source.identity()

    def close(self) -> None:
        """Release files."""
        self._kept = threading.local()
        self.source.close()

    def _read_rows(self, view: View, number: int, span: tuple[int, int], into: Tensor) -> None:
        width = view.shape[1]
        for piece in view.matrices[number]:
            low = max(span[0], piece.put.start * width)
            high = min(span[1], piece.put.stop * width)
            if low < high:
                shift = piece.start + (piece.take.start - piece.put.start) * width
                values = self.source.read(piece.key, low + shift, high + shift)
                into[low - span[0] : high - span[0]] = values

    def _matrix(self, name: str, number: int, last: bool) -> Tensor:
        """Return one matrix of a view, flat; kept until its last element has been read."""
        kept = getattr(self._kept, "matrix", None)
        if kept is None or kept[0] != (name, number):
            self._kept.matrix = None  # or two would be held
            kept = ((name, number), self._put_together(self.views[name], number))
            self._kept.matrix = kept
        if last:
            self._kept.matrix = None
        return kept[1]

    def _put_together(self, view: View, number: int) -> Tensor:
        rows, columns = view.shape
        pieces = view.matrices[number]
        stored = torch.empty(rows, columns, dtype=self.source.entries[pieces[0].key].dtype)
        matrix = stored.T if view.turned else stored
        for piece in pieces:
            count = piece.shape[0] * piece.shape[1]
            values = self.source.read(piece.key, piece.start, piece.start + count)
            values = values.view(piece.shape)
            matrix[piece.put] = (values.T if piece.turned else values)[piece.take]
        return stored.view(-1)


def check_one_dtype(name: str, view: View, entries: Mapping[str, TensorEntry], label: str) -> None:
    """Refuse a tensor whose pieces are of different types."""
    types = {entries[key].dtype for key in view.keys}
    if len(types) > 1:
        listed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
        raise CheckpointError(
            f"{label}: '{name}' of the base is kept there in {len(view.keys)} tensors of different "
            f"types ({listed}).\nSave the expert in one dtype."
        )
