"""LoRA on the single experts of a mixture whose matrices the base keeps in stacks, or fused.

Servers and trainers write factors expert by expert (`experts.3.w1.lora_A`). Each product goes to
the rows of the matrix that it is part of; experts that are not adapted keep theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eutectic.checkpoint.adapter_keys import Group
from eutectic.checkpoint.changes import Change
from eutectic.checkpoint.header import TensorEntry
from eutectic.checkpoint.layouts import model_types
from eutectic.checkpoint.packed_adapters import MetBase
from eutectic.conventions_layouts import ALTERNATING, GATE_UP, INPUTS_FIRST, Packing, packing
from eutectic.errors import CheckpointError

if TYPE_CHECKING:
    from eutectic.checkpoint.reader import TensorSource


@dataclass(frozen=True)
class Product:
    """scaling·B·A, which is some rows of a matrix `[out, in]`."""

    a: TensorEntry
    b: TensorEntry
    scaling: float
    rows: slice


@dataclass(frozen=True, eq=False)
class ExpertProducts:
    """A change of a stack, or of one fused matrix, by products for some of its matrices."""

    source: "TensorSource"
    products: Mapping[int, tuple[Product, ...]]  # number of the matrix -> its parts
    shape: tuple[int, int]  # of one matrix as the base keeps it
    turned: bool  # the base keeps [in, out]

    @property
    def held_bytes(self) -> int:
        """Bytes of one matrix in two layouts, and of its factors."""
        most = max(sum(p.a.numel + p.b.numel for p in own) for own in self.products.values())
        return 8 * (2 * self.shape[0] * self.shape[1] + most)

    @property
    def zero(self) -> bool:
        """Whether a factor of every product is zero."""
        every = (p for own in self.products.values() for p in own)
        return not any(bool(self.source.read(p.b.name).any()) for p in every)

    @property
    def inner_rank(self) -> int | None:
        """The ranks of the products in a matrix together, the most of any."""
        return max(sum(p.a.shape[0] for p in own) for own in self.products.values())

    def delta(self, start: int, stop: int, base: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a range of Δ; a matrix is computed for each range that reaches into it."""
        size = self.shape[0] * self.shape[1]
        change = torch.zeros(stop - start, dtype=dtype)
        for number in range(start // size, -(-stop // size) if stop > start else 0):
            if number in self.products:
                low, high = max(start, number * size), min(stop, (number + 1) * size)
                part = self._matrix(number, dtype)[low - number * size : high - number * size]
                change[low - start : high - start] = part
        return change

    def _matrix(self, number: int, dtype: torch.dtype) -> Tensor:
        rows, columns = self.shape[::-1] if self.turned else self.shape
        matrix = torch.zeros(rows, columns, dtype=dtype)
        for part in self.products[number]:
            a, b = (self.source.read(e.name).view(e.shape).to(dtype) for e in (part.a, part.b))
            matrix[part.rows] = (b * part.scaling) @ a
        return (matrix.mT if self.turned else matrix).reshape(-1)


@dataclass(frozen=True)
class SingleExperts:
    """Where factors of single experts meet the base."""

    changes: Mapping[str, Change]  # name of the base -> change
    read: Mapping[str, tuple[TensorEntry, ...]]  # name of the base -> what is read of the adapter
    met: frozenset[str]  # the adapter's own names of what these are made of


def meet_single_experts(
    source: "TensorSource",
    groups: Mapping[str, Group],
    scalings: Mapping[str, float],
    base: MetBase,
    label: str,
) -> SingleExperts:
    """Return the changes of packed tensors by plain factors of single matrices.

    `groups` and `scalings` are those of parameters that the base does not have by their own name.
    What no packed tensor of the base holds is left to the caller.
    """
    made: dict[str, dict[int, list[Product]]] = {}
    turned: dict[str, bool] = {}
    met: set[str] = set()
    for own, group in groups.items():
        how = packing(base.alignment.form_of_key(own).name, 2)
        if how is None or group.keys() != {"lora_A", "lora_B"}:
            continue
        found = _holder(how, base)
        if found is None:
            continue
        name, packed = found
        place = _place(own, group, (how, packed), (name, base), label)
        if turned.setdefault(name, place.turned) != place.turned:
            raise _misfit(own, group, name, base.entries[name], label)
        product = Product(group["lora_A"], group["lora_B"], scalings[own], place.rows)
        made.setdefault(name, {}).setdefault(place.number, []).append(product)
        met.add(own)
    changes: dict[str, Change] = {}
    read: dict[str, tuple[TensorEntry, ...]] = {}
    for name, products in made.items():
        shape = base.entries[name].shape[-2:]
        parts = {number: tuple(own) for number, own in sorted(products.items())}
        changes[name] = ExpertProducts(source, parts, (shape[0], shape[1]), turned[name])
        read[name] = tuple(e for own in parts.values() for p in own for e in (p.a, p.b))
    return SingleExperts(changes, read, frozenset(met))


def _holder(how: Packing, base: MetBase) -> tuple[str, Packing] | None:
    """Return the base's tensor that holds a matrix beside others."""
    for name, entry in base.mixtures.get(how.group, {}).items():
        packed = packing(base.alignment.form_of_name(name).name, len(entry.shape))
        if packed is None or packed.kind != "weight" or not {*how.roles} <= {*packed.roles}:
            continue
        in_stack = packed.stacked and how.expert is not None and how.expert < entry.shape[0]
        if in_stack or packed.expert == how.expert and not packed.stacked:
            # Of a fused matrix the parts are only known where they are halves.
            if packed.roles in (how.roles, GATE_UP):
                return name, packed
    return None


@dataclass(frozen=True)
class _Place:
    number: int  # of the matrix
    rows: slice
    turned: bool


def _place(
    own: str,
    group: Group,
    packings: tuple[Packing, Packing],
    held: tuple[str, MetBase],
    label: str,
) -> _Place:
    (how, packed), (name, base) = packings, held
    height, width = group["lora_B"].shape[0], group["lora_A"].shape[1]
    parts = len(packed.roles) // len(how.roles)
    entry, rows = base.entries[name], height * parts
    shape = entry.shape[-2:]
    straight, across = shape == (rows, width), shape == (width, rows)
    models = model_types(base.config)
    if not (straight or (across and packed.stacked)):
        raise _misfit(own, group, name, entry, label)
    turned = bool(models & INPUTS_FIRST) if straight and across and packed.stacked else not straight
    position = packed.roles.index(how.roles[0])
    put = slice(0, rows)
    if parts > 1:
        put = slice(position * height, (position + 1) * height)
        if models & ALTERNATING:
            put = slice(position, rows, parts)
    return _Place(how.expert or 0 if packed.stacked else 0, put, turned)


def _misfit(own: str, group: Group, name: str, entry: TensorEntry, label: str) -> CheckpointError:
    a, b = (list(group[part].shape) for part in ("lora_A", "lora_B"))
    return CheckpointError(
        f"{label}: the factors A {a} and B {b} of '{own}' do not fit '{name}' {list(entry.shape)}, "
        "in which the base keeps that matrix.\nThe adapter belongs to another base."
    )
