"""Sums of outer products, in as little memory as the number of rows allows."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from eutectic.cluster.devices import has_float64
from eutectic.errors import NumericalError

# Rows summed by one product: enough to make the addition of its [d, d] result cheap, few enough
# that float32 products stay at rounding level.
BLOCK_ROWS = 512
Rank = int | Literal["auto"]
TAIL = 0.1  # of the trace: what "auto" leaves to the diagonal, as far as `MOST` allows
MOST = 512
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
_ROWS = {"count", "rows"}  # of a state; the rest of it are sums


class RowSum(ABC):
    """A sum over rows `[d]`, added up by blocks of them.

    Blocks are cut at fixed row numbers, so that the sum does not depend on how the rows were
    batched. `_sums` has the blocks' sums by name, in float64; the rows after the last one wait.
    """

    def __init__(self, width: int, block: int) -> None:
        self.width = width
        self.count = 0
        self._block = block
        self._rows: list[Tensor] = []
        self._waiting = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, rows: Tensor) -> None:
        """Add rows `[n, d]`, float32 or float64; they may be kept, and must not change later."""
        self._rows.append(rows)
        self._waiting += len(rows)
        self.count += len(rows)
        if self._waiting >= self._block:
            whole = self._gather()
            cut = len(whole) - len(whole) % self._block
            for start in range(0, cut, self._block):
                self._multiply(whole[start : start + self._block])
            # A copy, so that the block's memory is freed.
            self._rows = [whole[cut:].clone()]
            self._waiting = len(whole) - cut

    def state(self) -> dict[str, Tensor]:
        """Return everything needed to go on with the sum, in full precision."""
        rows = {"rows": self._gather()} if self._waiting else {}
        return {"count": torch.tensor(self.count), **rows, **self._sums}

    def load(self, state: Mapping[str, Tensor], device: torch.device | None = None) -> None:
        """Go on from a `state`."""
        self.count = int(state["count"])
        rows = state.get("rows")
        self._rows = [] if rows is None else [rows.to(device)]
        self._waiting = 0 if rows is None else len(rows)
        self._sums = {n: held.to(device) for n, held in state.items() if n not in _ROWS}

    def join(self, state: Mapping[str, Tensor]) -> None:
        """Add another sum of the same form, by its `state`."""
        for name in state.keys() - _ROWS:
            own, other = self._sums.get(name), state[name]
            self._sums[name] = other.clone() if own is None else own + other
        rows = state.get("rows")
        self.count += int(state["count"]) - (0 if rows is None else len(rows))
        if rows is not None:
            self.add(rows)

    def _gather(self) -> Tensor:
        """Return the rows that wait."""
        if not self._rows:
            return torch.zeros(0, self.width)
        if len(self._rows) > 1:
            self._rows = [torch.cat(self._rows)]
        return self._rows[0]

    def _finish(self) -> None:
        """Take the rows that wait as the last block."""
        self._multiply(self._gather())
        self._rows, self._waiting = [], 0

    def _plus(self, name: str, value: Tensor) -> None:
        """Add to one of the sums."""
        if name in self._sums:
            self._sums[name] += value
        else:
            self._sums[name] = value.double()

    @abstractmethod
    def _multiply(self, rows: Tensor) -> None:
        """Add a block's sums."""


class GramSum(RowSum):
    """Σ x xᵀ over rows x `[d]`, exact in form: rows while they are few, a matrix from then on.

    Products of blocks of rows are formed in float32 (float64 for float64 rows) and added up in
    float64. Memory: at most 8d² bytes and one block.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, max(width, BLOCK_ROWS))

    @property
    def most_bytes(self) -> int:
        """How many bytes it takes at most, beside one block of rows."""
        return 8 * self.width**2

    def tensors(self, rank: Rank | None = None, seed: str = "") -> dict[str, Tensor]:
        """Return the sum in float64, nothing for n = 0.

        `{"factor": F}` with A = FᵀF and F `[n, d]` upper trapezoidal, when n < d; else
        `{"gram": A}`. With `rank` below both: `{"factor": F [rank, d], "diagonal": e}` with
        A ≈ FᵀF + diag(e), the diagonal of A exact and FᵀF ≤ A.
        """
        if self.count == 0:
            return {}
        if not self._sums and self.count < self.width:
            factor = triangular_factor(self._gather().double())
            return {"factor": factor} if rank is None else leading_rows(factor, rank)
        gram = self.dense()
        if rank == "auto":
            rank = enough(torch.linalg.eigvalsh(gram).flip(0), float(gram.trace()))
        if rank is None or rank >= self.width:
            return {"gram": gram}
        return truncate_gram(gram, rank, seed)

    def dense(self) -> Tensor:
        """Return A `[d, d]`, symmetric, float64."""
        if self._waiting or not self._sums:
            self._finish()
        matrix = self._sums["matrix"]
        return (matrix + matrix.T) / 2

    def _multiply(self, rows: Tensor) -> None:
        self._plus("matrix", rows.T @ rows)


def triangular_factor(rows: Tensor) -> Tensor:
    """Return F `[min(n, d), d]` with FᵀF = XᵀX for X `[n, d]`: R of QR, diagonal ≥ 0.

    F says what the Gram says and no more: neither the rows nor their order can be read off it.
    """
    factor = torch.linalg.qr(rows, mode="r").R
    signs = torch.where(factor.diagonal() < 0, -1.0, 1.0).to(factor)
    return factor * signs.unsqueeze(1)


def leading_rows(factor: Tensor, rank: Rank, diagonal: Tensor | None = None) -> dict[str, Tensor]:
    """Return the leading directions of FᵀF and what they leave of a diagonal, FᵀF's own by default.

    `rank` says how many; "auto" takes the fewest that leave at most `TAIL` of the trace, and at
    most `MOST`. A factor of as few rows is returned as it is.
    """
    alone = diagonal is None
    whole = factor.square().sum(0) if diagonal is None else diagonal
    if alone and isinstance(rank, int) and rank >= len(factor):
        return {"factor": factor}
    _, values, vectors = torch.linalg.svd(factor, full_matrices=False)
    count = rank if isinstance(rank, int) else enough(values.square(), float(whole.sum()))
    if alone and count >= len(factor):
        return {"factor": factor}
    kept = values[:count, None] * vectors[:count]
    rest = whole - kept.square().sum(0)
    return {"factor": kept, "diagonal": rest.clamp(min=0)}


def enough(energies: Tensor, trace: float) -> int:
    """Return the fewest leading directions that leave at most `TAIL` of a trace, at most `MOST`."""
    reached = energies.cumsum(0) >= (1 - TAIL) * trace
    count = int(reached.int().argmax()) + 1 if bool(reached.any()) else len(energies)
    return max(1, min(count, MOST))


def truncate_gram(gram: Tensor, rank: int, seed: str) -> dict[str, Tensor]:
    """Return F `[rank, d]` and e `[d]` with A ≈ FᵀF + diag(e); diag A is kept exactly.

    Nyström on a subspace found by power iteration from a start that `seed` decides: it never
    exceeds A, so that e ≥ 0. Cost: O(d² rank).
    """
    width = len(gram)
    columns = min(width, rank + _OVERSAMPLING)
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    basis = torch.randn(width, columns, generator=generator, dtype=gram.dtype).to(gram.device)
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(gram @ basis).Q
    image = gram @ basis
    values, vectors = torch.linalg.eigh(basis.T @ image)
    positive = values > values[-1] * len(gram) * torch.finfo(gram.dtype).eps
    scaled = vectors[:, positive] / values[positive].sqrt()
    factor = leading_rows((image @ scaled).T.contiguous(), rank)["factor"]
    rest = gram.diagonal() - factor.square().sum(0)
    return {"factor": factor, "diagonal": rest.clamp(min=0)}


def check_finite(rows: Tensor, name: str, batch: int, what: str) -> None:
    """Raise NumericalError when rows hold NaN or Inf."""
    if not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows)).any(-1).sum())
        raise NumericalError(
            f"NaN or Inf in the {what} of '{name}', batch {batch}: {bad} of {len(rows)} tokens.\n"
            "Nothing was written. Check the data of that batch, and whether the model overflows "
            "in its dtype."
        )


def as_float(values: Tensor) -> Tensor:
    """Return values detached, in float32 at least, on a device that can add in float64."""
    values = values.detach()
    if not has_float64(values.device.type):
        values = values.cpu()
    return values if values.dtype == torch.float64 else values.float()
