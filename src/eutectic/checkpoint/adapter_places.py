"""Indices that an adapter stores: whether there is anything at the places they name."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from eutectic.checkpoint.header import TensorEntry
from eutectic.checkpoint.peft_kinds.formulas import Places
from eutectic.errors import CheckpointError

if TYPE_CHECKING:
    from eutectic.checkpoint.reader import TensorSource


def misplaced(
    source: "TensorSource", parts: Mapping[str, TensorEntry], places: Places
) -> Iterator[str]:
    """Yield what is wrong with the indices among the parts of one layer, a text a tensor.

    Reads these parts; without a bound, only places below 0 are wrong.
    """
    for part, bounds in places.items():
        entry = parts.get(part)
        if entry is None or not entry.numel or entry.numel % len(bounds):
            continue  # another shape is refused with the other parts'
        if entry.dtype.is_floating_point or entry.dtype.is_complex:
            dtype = str(entry.dtype).removeprefix("torch.")
            yield f"'{entry.name}' holds {dtype}, where indices are whole numbers"
            continue
        rows = source.read(entry.name).to(torch.int64).view(len(bounds), -1)
        for row, bound in zip(rows, bounds, strict=True):
            least, most = (int(end) for end in row.aminmax())
            if least >= 0 and (bound is None or most < bound):
                continue
            wrong = least if least < 0 else most
            allowed = "0 or more" if bound is None else f"0 to {bound - 1}"
            yield f"'{entry.name}' holds the index {wrong}, and {allowed} are allowed"
            break


def counted(wrong: Sequence[str]) -> str:
    """Return the first of several texts, and how many more tensors there are like it."""
    rest = len(wrong) - 1
    return wrong[0] + (f" ({rest} more {'tensor' if rest == 1 else 'tensors'} too)" if rest else "")


def refuse_misplaced(wrong: Sequence[str], label: str) -> None:
    """Raise CheckpointError where indices of any layer are wrong."""
    if wrong:
        raise CheckpointError(
            f"{label}: {counted(wrong)}.\n"
            "The adapter belongs to another base, or its file is damaged."
        )
