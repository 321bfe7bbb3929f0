"""What every family of formats makes of a file: logical tensors, and how their ranges are read."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.index import TensorEntry

Entries = Mapping[str, TensorEntry]
Read = Callable[[str, int, int], Tensor]  # elements [start, stop) of a tensor as it is stored


class Unreadable(Exception):
    """Why the codes of one tensor cannot be turned into numbers, in a few words."""


@dataclass(frozen=True)
class Stated:
    """What a checkpoint's configuration says of its numbers."""

    method: str = ""  # `quant_method`, in lower case
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])  # `quantization_config`
    dtype: torch.dtype | None = None  # of the model
    beside: torch.dtype = torch.bfloat16  # of the numbers that are not quantised
    conv1d: bool = False  # its linear layers are `Conv1D`, kept [in, out] without quantisation

    @property
    def weights(self) -> list[Mapping[str, Any]]:
        """What the groups of compressed-tensors say of weights."""
        groups = self.settings.get("config_groups")
        own = groups.values() if isinstance(groups, Mapping) else ()
        found = (group.get("weights") for group in own if isinstance(group, Mapping))
        return [weights for weights in found if isinstance(weights, Mapping)]

    def dtype_beside(self, scales: torch.dtype) -> torch.dtype:
        """Return the dtype of numbers: the model's, that of 16-bit scales, or of what is beside."""
        half = scales in (torch.float16, torch.bfloat16)
        return self.dtype or (scales if half else self.beside)


@dataclass(frozen=True)
class Codes(ABC):
    """A logical tensor, and the stored tensors that its values are computed from."""

    kind: str  # what notes call it, such as "fp8 blocks"
    entry: TensorEntry  # as the checkpoint would hold it without quantisation; bytes as stored
    anchor: str  # the stored tensor whose place in the file it takes
    parts: tuple[str, ...]  # every stored tensor that belongs to it, the anchor among them

    @property
    def band(self) -> int:
        """Number of entries that are computed at once and kept for the next read.

        0 where a range costs no more than itself: where the file has the tensor's own order.
        """
        return 0

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return what else than stored bytes decides the values."""
        return ()

    @abstractmethod
    def decode(self, read: Read, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flattened tensor, 1-D, in the entry's dtype."""


@dataclass(frozen=True)
class RowCodes(Codes):
    """Codes of which whole rows are computed, rows being those of the last dimension."""

    @property
    def width(self) -> int:
        """Entries of a row."""
        return self.entry.shape[-1] if self.entry.shape else 1

    @abstractmethod
    def rows(self, read: Read, first: int, last: int) -> Tensor:
        """Return rows [first, last) of the tensor seen as a matrix, in the entry's dtype."""

    def decode(self, read: Read, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flattened tensor, 1-D, in the entry's dtype."""
        if start >= stop:
            return torch.empty(0, dtype=self.entry.dtype)
        first, last = start // self.width, -(-stop // self.width)
        values = self.rows(read, first, last).reshape(-1)
        values = values[start - first * self.width : stop - first * self.width]
        return values.clone() if len(values) < values.untyped_storage().nbytes() else values


_BAND_BYTES = 2 << 20


def rows_per_band(rows: int, row_bytes: int, multiple: int) -> int:
    """Return how many rows are computed together, a multiple of what is packed together."""
    wanted = max(1, _BAND_BYTES // max(row_bytes, 1))
    return min(rows, max(multiple, wanted // multiple * multiple))


@dataclass(frozen=True)
class Transposed(Codes):
    """The transpose of other codes: a format that keeps `Conv1D` as linear layers are kept."""

    inner: Codes

    @property
    def band(self) -> int:
        """All entries: every one of its rows is a column of the inner."""
        return self.entry.numel

    @property
    def settings(self) -> tuple[Any, ...]:
        """Return the inner's."""
        return self.inner.settings

    def decode(self, read: Read, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flattened tensor, 1-D, in the entry's dtype."""
        whole = self.inner.decode(read, 0, self.entry.numel)
        return whole.view(self.inner.entry.shape).T.reshape(-1)[start:stop].clone()


def read_columns(
    read: Read, entry: TensorEntry, rows: tuple[int, int], columns: tuple[int, int]
) -> Tensor:
    """Return a block of a stored matrix, which is read row by row where that moves less."""
    (top, bottom), (left, right) = rows, columns
    width = entry.shape[-1]
    if right - left >= width // 4 or (bottom - top) * width * entry.dtype.itemsize <= 1 << 16:
        whole = read(entry.name, top * width, bottom * width).view(bottom - top, width)
        return whole[:, left:right]
    block = torch.empty(bottom - top, right - left, dtype=entry.dtype)
    for row in range(top, bottom):
        block[row - top] = read(entry.name, row * width + left, row * width + right)
    return block
