"""Adapters of matrices that the base keeps with others: in stacks, or side by side in one.

Servers, trainers and older models adapt a mixture expert by expert (`experts.3.w1.lora_A`), and
q, k and v, or gate and up, each for itself. Each change goes to the rows of the matrix that it is
part of, and sees those rows of the base as its W₀; rows that nobody adapts keep theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eutectic.checkpoint.adapter_keys import Group
from eutectic.checkpoint.adapter_layers import OpenAdapter, module_of, parts_fit
from eutectic.checkpoint.changes import BaseWeights, Change, Kept, WholeChange, kept
from eutectic.checkpoint.expert_tensors import Factors
from eutectic.checkpoint.header import TensorEntry
from eutectic.checkpoint.layouts import model_types
from eutectic.checkpoint.packed_adapters import MetBase
from eutectic.checkpoint.peft_kinds.formulas import Shape
from eutectic.conventions_layouts import (
    ALTERNATING,
    GATE_UP,
    INPUTS_FIRST,
    QKV,
    Packing,
    attention_heights,
    packing,
)
from eutectic.errors import CheckpointError

if TYPE_CHECKING:
    from eutectic.checkpoint.reader import TensorSource


@dataclass(frozen=True)
class Place:
    """Where the base keeps a matrix that an adapter knows by another name."""

    name: str  # of the base's tensor
    number: int  # of the matrix in a stack
    rows: slice  # of that matrix `[out, in]`
    turned: bool  # the base keeps `[in, out]`
    shape: Shape  # of the rows, as the adapted model keeps them


@dataclass(frozen=True)
class Part:
    """What an adapter does to some rows of a matrix: a product, another change, a replacement."""

    rows: slice
    factors: Factors | None
    change: Change | None
    full: TensorEntry | None  # stored in full, where no change has it

    @property
    def on_base(self) -> bool:
        """Whether it looks at these rows of the base."""
        if isinstance(self.change, WholeChange):
            return self.change.formula.on_base or self.change.whole is not None
        return self.full is not None


@dataclass(frozen=True, eq=False)
class PackedParts:
    """A change of a stack, or of one fused matrix, by changes of rows of some of its matrices."""

    name: str  # of the base's tensor
    source: "TensorSource"
    parts: Mapping[int, tuple[Part, ...]]  # number of the matrix -> what acts on it
    shape: tuple[int, int]  # of one matrix as the base keeps it; of a bias, a column
    turned: bool  # the base keeps `[in, out]`
    base: BaseWeights
    kept: Kept

    @property
    def held_bytes(self) -> int:
        """Bytes of one matrix in three layouts, and of what its parts hold."""
        size, most = self.shape[0] * self.shape[1], 0
        for own in self.parts.values():
            pairs = [p.factors for p in own if p.factors is not None]
            held = sum(8 * (f.a.numel + f.b.numel) for f in pairs)
            most = max(most, held + max((p.change.held_bytes for p in own if p.change), default=0))
        return 8 * 3 * size + most

    @property
    def zero(self) -> bool:
        """Whether all are products with a factor that is zero."""
        every = [part for own in self.parts.values() for part in own]
        if any(part.factors is None or part.full is not None for part in every):
            return False
        pairs = [part.factors for part in every if part.factors is not None]
        return not any(bool(self.source.read(pair.b.name).any()) for pair in pairs)

    @property
    def inner_rank(self) -> int | None:
        """The ranks of the products in a matrix together, the most of any."""
        ranks: list[int] = []
        for own in self.parts.values():
            pairs = [part.factors for part in own if part.full is None]
            if any(pair is None for pair in pairs) or len(pairs) < len(own):
                return None
            ranks.append(sum(pair.a.shape[0] for pair in pairs if pair is not None))
        return max(ranks)

    def delta(self, start: int, stop: int, base: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a range of Δ; a matrix is computed whole, and kept until its last element."""
        size = self.shape[0] * self.shape[1]
        change = torch.zeros(stop - start, dtype=dtype)
        for number in range(start // size, -(-stop // size) if stop > start else 0):
            if number not in self.parts:
                continue
            low, high = max(start, number * size), min(stop, (number + 1) * size)
            whole = high - low == size
            given = base[low - start : high - start] if whole else None

            def compute(number: int = number, given: Tensor | None = given) -> Tensor:
                return self._matrix(number, given, dtype)

            first, last = low == number * size, high == (number + 1) * size
            values = self.kept.get((self.name, number, dtype), first, last, compute)
            change[low - start : high - start] = values[low - number * size : high - number * size]
        return change

    def _matrix(self, number: int, given: Tensor | None, dtype: torch.dtype) -> Tensor:
        size = self.shape[0] * self.shape[1]
        if given is None and any(part.on_base for part in self.parts[number]):
            given = self.base.read(self.name, number * size, (number + 1) * size).to(dtype)
        if given is None:
            given = torch.zeros(1, dtype=dtype).expand(size)
        stored = given.view(self.shape) if given.is_contiguous() else given[:1].expand(self.shape)
        seen = stored.mT if self.turned else stored
        matrix = torch.zeros(seen.shape, dtype=dtype)
        for part in self.parts[number]:
            block = seen[part.rows]
            if part.change is not None:
                found = part.change.delta(0, block.numel(), block.reshape(-1), dtype)
                matrix[part.rows] = found.view(block.shape)
                continue
            if part.factors is not None:
                a, b = (
                    self.source.read(e.name).view(e.shape).to(dtype)
                    for e in (part.factors.a, part.factors.b)
                )
                matrix[part.rows] = (b * part.factors.scaling) @ a
            if part.full is not None:
                values = self.source.read(part.full.name).to(dtype).view(block.shape)
                matrix[part.rows] += values - block
        return (matrix.mT if self.turned else matrix).reshape(-1)


def find_places(
    adapter: OpenAdapter, groups: Mapping[str, Group], base: MetBase
) -> dict[str, Place]:
    """Return where the base keeps the parameters that it does not have by their own name.

    What no packed tensor of the base holds is left out. CheckpointError where parts do not fit
    there, or nothing says how many rows of a fused matrix each has.
    """
    held: dict[str, dict[str, tuple[Packing, Packing]]] = {}
    for own in groups:
        dimensions = 1 if own.endswith(".bias") else 2
        how = packing(base.alignment.form_of_key(own).name, dimensions)
        if how is None or own in base.entries:
            continue
        found = _holder(how, base)
        if found is not None:
            held.setdefault(found[0], {})[own] = (how, found[1])
    places: dict[str, Place] = {}
    for name, members in held.items():
        places |= _places(adapter, name, members, groups, base)
    return places


def changes_of_packed(
    places: Mapping[str, Place],
    groups: Mapping[str, Group],
    made: tuple[Mapping[str, Factors], Mapping[str, Change]],
    adapter: OpenAdapter,
    base: MetBase,
    weights: BaseWeights,
) -> tuple[dict[str, Change], dict[str, tuple[TensorEntry, ...]]]:
    """Return the changes of packed tensors, and what is read of the adapter for each.

    `made` are the factors and other changes of the parts by the adapter's own names.
    """
    factored, changed = made
    parts: dict[str, dict[int, list[Part]]] = {}
    read: dict[str, tuple[TensorEntry, ...]] = {}
    for own, place in places.items():
        change = changed.get(own)
        full = None if change is not None else groups[own].get("full")
        part = Part(place.rows, factored.get(own), change, full)
        parts.setdefault(place.name, {}).setdefault(place.number, []).append(part)
        read[place.name] = (*read.get(place.name, ()), *groups[own].values())
    turned = {place.name: place.turned for place in places.values()}
    changes: dict[str, Change] = {}
    for name, numbered in parts.items():
        shape = _matrix_shape(base, name)
        tupled = {number: tuple(own) for number, own in sorted(numbered.items())}
        source = adapter.source
        changes[name] = PackedParts(name, source, tupled, shape, turned[name], weights, kept())
    return changes, read


def _holder(how: Packing, base: MetBase) -> tuple[str, Packing] | None:
    """Return the base's tensor that holds a matrix beside others."""
    for name, entry in base.mixtures.get(how.group, {}).items():
        packed = packing(base.alignment.form_of_name(name).name, len(entry.shape))
        if packed is None or packed.kind != how.kind or not {*how.roles} <= {*packed.roles}:
            continue
        in_stack = packed.stacked and how.expert is not None and how.expert < entry.shape[0]
        if in_stack or packed.expert == how.expert and not packed.stacked:
            return name, packed
    return None


def _matrix_shape(base: MetBase, name: str) -> tuple[int, int]:
    """Return the shape of one matrix as the base keeps it; a bias is a column."""
    entry = base.entries[name]
    packed = packing(base.alignment.form_of_name(name).name, len(entry.shape))
    assert packed is not None
    shape = entry.shape[1:] if packed.stacked else entry.shape
    return shape[0], shape[1] if len(shape) > 1 else 1


def _places(
    adapter: OpenAdapter,
    name: str,
    members: Mapping[str, tuple[Packing, Packing]],
    groups: Mapping[str, Group],
    base: MetBase,
) -> dict[str, Place]:
    """Return the places in one tensor of the base, in the order of axes that lets all parts fit."""
    shape = _matrix_shape(base, name)
    packed = next(iter(members.values()))[1]
    orders = (False, True) if packed.stacked and packed.kind == "weight" else (False,)
    fitting: dict[bool, dict[str, Place]] = {}
    odd: list[str] = []
    for turned in orders:
        size = (shape[1], shape[0]) if turned else shape
        heights = _heights(adapter, name, members, groups, base, size[0])
        found = {
            own: _place(name, how, packed, heights, (size, turned), base)
            for own, (how, _) in members.items()
        }
        odd = [own for own, place in found.items() if not _fits(adapter, own, groups[own], place)]
        if not odd:
            fitting[turned] = found
    if not fitting:
        raise _misfit(adapter, odd[0], groups[odd[0]], name, base)
    inputs_first = bool(model_types(base.config) & INPUTS_FIRST)
    return fitting[inputs_first] if len(fitting) == 2 else next(iter(fitting.values()))


def _place(
    name: str,
    how: Packing,
    packed: Packing,
    heights: Mapping[str, int],
    laid: tuple[tuple[int, int], bool],
    base: MetBase,
) -> Place:
    (rows, columns), turned = laid
    height, put = rows, slice(0, rows)
    if packed.roles != how.roles:
        position = packed.roles.index(how.roles[0])
        height = heights[how.roles[0]]
        first = sum(heights[role] for role in packed.roles[:position])
        put = slice(first, first + height)
        if packed.roles == GATE_UP and model_types(base.config) & ALTERNATING:
            put = slice(position, rows, 2)
    number = (how.expert or 0) if packed.stacked else 0
    shape = (height,) if how.kind == "bias" else (height, columns)
    return Place(name, number, put, turned, shape)


def _heights(
    adapter: OpenAdapter,
    name: str,
    members: Mapping[str, tuple[Packing, Packing]],
    groups: Mapping[str, Group],
    base: MetBase,
    rows: int,
) -> dict[str, int]:
    """Return how many rows each role has in a matrix of the base."""
    packed = next(iter(members.values()))[1]
    if packed.roles != QKV:
        return dict.fromkeys(packed.roles, rows // len(packed.roles))
    stated = attention_heights(base.config, rows)
    if stated is None:
        stated = _told_by_parts(members, groups, rows)
    if stated is None:
        raise CheckpointError(
            f"{adapter.label}: acts on '{next(iter(members))}', which the base keeps in '{name}' "
            f"{list(base.entries[name].shape)}, and nothing says how many rows of it are q, k and "
            "v.\nGive the base its config.json, with num_attention_heads and num_key_value_heads."
        )
    return dict(zip(QKV, stated, strict=True))


def _told_by_parts(
    members: Mapping[str, tuple[Packing, Packing]], groups: Mapping[str, Group], rows: int
) -> tuple[int, int, int] | None:
    """Return the rows of q, k and v by what an adapter has of them; k and v have as many."""
    own: dict[str, int] = {}
    for member, (how, _) in members.items():
        group = groups[member]
        entry = group.get("lora_B") or group.get("full") or group.get("vera_lambda_b")
        if entry is not None:
            own[how.roles[0]] = entry.shape[0]
    side = own.get("k", own.get("v"))
    if side is None and "q" in own:
        side = (rows - own["q"]) // 2
    if side is None:
        return None
    heights = (rows - 2 * side, side, side)
    agree = all(heights[QKV.index(role)] == height for role, height in own.items())
    return heights if min(heights) > 0 and agree else None


def _fits(adapter: OpenAdapter, own: str, group: Group, place: Place) -> bool:
    if "full" in group and group["full"].shape != place.shape:
        return False
    acting = {part: entry for part, entry in group.items() if part != "full"}
    return not acting or parts_fit(adapter, module_of(own), acting, place.shape)


def _misfit(
    adapter: OpenAdapter, own: str, group: Group, name: str, base: MetBase
) -> CheckpointError:
    shapes = ", ".join(f"{part} {list(entry.shape)}" for part, entry in group.items())
    return CheckpointError(
        f"{adapter.label}: the parts of '{own}' ({shapes}) do not fit '{name}' "
        f"{list(base.entries[name].shape)}, in which the base keeps that matrix.\n"
        "The adapter belongs to another base."
    )
