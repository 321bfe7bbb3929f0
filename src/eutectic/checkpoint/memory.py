"""State dicts in memory, seen as checkpoints."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.content import sampled_fingerprint
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.pickles import check_dense
from eutectic.errors import CheckpointError


class StateDictReader:
    """A state dict with the surface of `CheckpointReader`.

    Contiguous tensors are not copied until they are read; tied tensors and views are fine.
    """

    is_delta = False

    def __init__(self, state_dict: Mapping[str, Any], label: str = "the state dict") -> None:
        """Take a state dict; `label` names it in messages.

        Raises:
            CheckpointError: a value is not a dense tensor, or there is none at all.
        """
        self.label = label
        self._tensors: dict[str, Tensor] = {}
        for name, value in state_dict.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{label}: '{name}' is not a tensor but {type(value).__name__}.\n"
                    "Pass model.state_dict(), without optimizer or other state."
                )
            # Once here, or every chunk of a strided tensor would copy the whole of it.
            self._tensors[str(name)] = check_dense(value, str(name), label).contiguous()
        if not self._tensors:
            raise CheckpointError(f"{label}: holds no tensors.")
        self.entries: Mapping[str, TensorEntry] = {
            name: TensorEntry(name, t.dtype, tuple(t.shape), "", -1, t.numel() * t.element_size())
            for name, t in self._tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of the flattened tensor: 1-D, its dtype, a copy on the CPU.

        Raises:
            CheckpointError: no such tensor.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self.label}: has no tensor '{name}'.")
        return self._tensors[name].view(-1)[start:stop].to("cpu", copy=True)

    def fingerprint(self) -> str:
        """Return the sampled identity of the content; equal to that of a saved copy."""
        return sampled_fingerprint(self)

    def identity(self) -> list[tuple[str, int, int]]:
        """Return no files."""
        return []

    def close(self) -> None:
        """Do nothing; the tensors belong to the caller."""


class MemoryWriter:
    """Tensors in memory with the surface of `CheckpointWriter`."""

    reopening = None

    def __init__(self, entries: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        self.tensors = {name: torch.empty(shape, dtype=dtype) for name, dtype, shape in entries}

    def write(self, name: str, start: int, values: Tensor) -> Tensor:
        """Write `values` over elements [start, start + n) of the flattened tensor `name`."""
        self.tensors[name].view(-1)[start : start + values.numel()] = values
        return values

    def read_back(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor, 1-D."""
        return self.tensors[name].view(-1)[start:stop]
