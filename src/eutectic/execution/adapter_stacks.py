"""Factors of a mixture's stacks as PEFT keeps them: the factors of all experts side by side.

A of a stack is `[E·r, in]`, one expert's rows after another's; B is `[out, E·r]`, whose columns
take turns: column k·E + e is the k-th of expert e. One rank for all: smaller ones end in zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eutectic.execution.adapter_factors import LEFT, RIGHT, open_part
from eutectic.planning.adapter_stacks import Slot

Read = Callable[[int, int], Tensor]
Row = tuple[torch.dtype, tuple[int, ...], Read]


@dataclass(frozen=True)
class Piece:
    """One tensor's part that lies in a stack."""

    tensor: str  # of the plan
    slot: Slot
    rank: int  # of its factors; of a whole stack the largest of its matrices'


def stack_rank(pieces: Sequence[Piece]) -> int:
    """Return how many directions each matrix of a stack gets: the most that any one needs."""
    of: dict[int | None, int] = {}
    for piece in pieces:
        of[piece.slot.expert] = of.get(piece.slot.expert, 0) + piece.rank
    return max(of.values())


def stack_rows(parts: Path, pieces: Sequence[Piece], rank: int) -> tuple[Row, Row]:
    """Return A and B of a stack as rows of a file, made of parts when they are read."""
    first = pieces[0]
    with open_part(parts, first.tensor) as reader:
        entry = reader.entries[RIGHT]
    count = first.slot.experts
    shapes = {"A": (count * rank, entry.shape[-1]), "B": (first.slot.outputs, count * rank)}
    kept: dict[str, Tensor] = {}

    def reader_of(side: str) -> Read:
        size = torch.Size(shapes[side]).numel()

        def read(start: int, stop: int) -> Tensor:
            if side not in kept:
                kept[side] = _factor(parts, pieces, side, rank, entry.dtype).flatten()
            values = kept[side][start:stop].clone()
            if stop >= size:
                del kept[side]
            return values

        return read

    a, b = ((entry.dtype, shapes[side], reader_of(side)) for side in ("A", "B"))
    return a, b


def _factor(
    parts: Path, pieces: Sequence[Piece], side: str, rank: int, dtype: torch.dtype
) -> Tensor:
    """Return A or B; experts' factors start one behind another where several make a matrix."""
    slot = pieces[0].slot
    with open_part(parts, pieces[0].tensor) as reader:
        width = reader.entries[RIGHT].shape[-1]
    shape = (slot.experts, rank, width) if side == "A" else (slot.outputs, rank, slot.experts)
    factor = torch.zeros(shape, dtype=dtype)
    taken: dict[int, int] = {}
    for piece in pieces:
        with open_part(parts, piece.tensor) as reader:
            name = RIGHT if side == "A" else LEFT
            held = reader.read(name).view(reader.entries[name].shape)
        whole = held if held.ndim == 3 else held[None]
        numbers = range(slot.experts) if piece.slot.expert is None else [piece.slot.expert]
        for number, own in zip(numbers, whole, strict=True):
            start = taken.get(number, 0)
            stop = taken[number] = start + piece.rank
            if side == "A":
                factor[number, start:stop] = own
            else:
                factor[piece.slot.rows or slice(None), start:stop, number] = own
    return factor


def nested_keys(
    stacks: Mapping[str, Sequence[Piece]], order: Sequence[str], root: str
) -> dict[str, str]:
    """Return stack -> the key of its wrapper: PEFT wraps a module once for each of its parameters.

    In the order of the module's own parameters, the first one innermost.
    """
    keys: dict[str, str] = {}
    modules: dict[str, list[str]] = {}
    for own in sorted(stacks, key=order.index):
        modules.setdefault(own.rpartition(".")[0], []).append(own)
    for module, owns in modules.items():
        for depth, own in enumerate(reversed(owns)):
            keys[own] = f"{root}{module}" + ".base_layer" * depth
    return keys
