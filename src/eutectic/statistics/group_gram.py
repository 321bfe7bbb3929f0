"""Sums of outer products within groups of channels, as grouped convolutions see their inputs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from eutectic.statistics.gram import BLOCK_ROWS, Rank


class GroupedGramSum:
    """Σ x_g x_gᵀ over rows x `[groups·d]`, for each group g of d neighbouring entries.

    What one group sees of another does not count: a grouped convolution multiplies each group by a
    kernel of its own. Products are formed and added up in float64, so that the sum in float32 does
    not depend on how the rows were batched. Memory: 8·groups·d² bytes and one block of rows.
    """

    def __init__(self, groups: int, width: int) -> None:
        self.groups, self.width = groups, width
        self.count = 0
        self._matrix: Tensor | None = None

    @property
    def most_bytes(self) -> int:
        """How many bytes it takes at most, beside one block of rows."""
        return group_bytes(self.groups, self.width)

    def add(self, rows: Tensor) -> None:
        """Add rows `[n, groups·d]`, float32 or float64."""
        self.count += len(rows)
        for block in rows.split(BLOCK_ROWS):
            apart = block.view(len(block), self.groups, self.width).transpose(0, 1)
            apart = apart.double()
            product = apart.mT @ apart
            self._matrix = product if self._matrix is None else self._matrix.add_(product)

    def tensors(self, rank: Rank | None = None, seed: str = "") -> dict[str, Tensor]:
        """Return `{"gram": A [groups, d, d]}` in float64, nothing for n = 0.

        Such Grams are small, and kept whole whatever the rank.
        """
        del rank, seed
        if self._matrix is None:
            return {}
        return {"gram": (self._matrix + self._matrix.mT) / 2}

    def state(self) -> dict[str, Tensor]:
        """Return everything needed to go on with the sum, in full precision."""
        state = {"count": torch.tensor(self.count)}
        return state if self._matrix is None else {**state, "matrix": self._matrix}

    def load(self, state: dict[str, Tensor], device: torch.device | None = None) -> None:
        """Go on from a `state`."""
        self.count = int(state["count"])
        self._matrix = state["matrix"].to(device) if "matrix" in state else None

    def join(self, state: Mapping[str, Tensor]) -> None:
        """Add another sum of the same groups, by its `state`."""
        self.count += int(state["count"])
        if (matrix := state.get("matrix")) is not None:
            self._matrix = matrix.clone() if self._matrix is None else self._matrix + matrix


def group_bytes(groups: int, width: int) -> int:
    """Return the bytes that a sum takes."""
    return 8 * groups * width**2
