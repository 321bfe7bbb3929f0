"""Mixtures kept in another layout than the base's: which pieces of an expert make which tensor.

Base and expert may each keep the matrices of a mixture one by one, stacked, or stacked with gate
and up in one, with the outputs or the inputs first. Names say which matrices a tensor holds
(`conventions_layouts`); shapes say in which order of axes, for both at once.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eutectic.checkpoint.arranged import Piece, View, check_one_dtype
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.names import Reading
from eutectic.conventions import layer_group
from eutectic.conventions_layouts import (
    ALTERNATING,
    GATE_UP,
    INPUTS_FIRST,
    OUTPUTS_FIRST,
    Packing,
    packing,
)
from eutectic.errors import CheckpointError

# How names of the base, and keys of the expert, are compared.
Forms = tuple[Callable[[str], str], Callable[[str], str]]


@dataclass(frozen=True)
class Side:
    """The tensors of the base or of an expert that may hold matrices of mixtures."""

    entries: Mapping[str, TensorEntry]
    packings: Mapping[str, Packing]  # by the tensor's own name
    models: frozenset[str]  # the model types that its configuration names


@dataclass(frozen=True)
class _Held:
    """One tensor of an expert that holds matrices in some roles."""

    entry: TensorEntry
    packing: Packing
    number: int  # of the expert within a stack


def model_types(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the model types that a configuration names, its parts' included."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return frozenset(str(part["model_type"]) for part in parts if part.get("model_type"))


def rearranged(
    tables: tuple[Mapping[str, TensorEntry], Mapping[str, TensorEntry]],
    mapping: Mapping[str, str],
    forms: Forms,
    configs: Sequence[Mapping[str, Any]],
    label: str,
) -> dict[str, View]:
    """Return how tensors of the base are made of an expert's tensors that have another layout.

    `tables` and `configs` are those of the base and of the expert; `mapping` says which key meets
    which name as it is, and stacks among them whose axes are exchanged are made anew. `forms` says
    how names are compared. CheckpointError where shapes and configurations allow two readings that
    differ.
    """
    base, own = tables
    met = {name: key for key, name in mapping.items()}
    pairs = ((base[name], own[key]) for name, key in met.items())
    turned = any(one is not other and _swapped(one, other) for one, other in pairs)
    if len(met) == len(base) and not turned:
        return {}
    names = [name for name in base if name not in met]
    keys = [key for key in own if key not in mapping]
    wanted = _packings(names, base, forms[0])
    if not (wanted or turned):
        return {}
    held = _packings(keys, own, forms[1])
    if turned:  # which square stacks are exchanged too is only to be seen with all of them
        pairs = _packings(list(met), base, forms[0])
        pairs = {name: found for name, found in pairs.items() if found.stacked}
        wanted.update(pairs)
        held.update({met[name]: found for name, found in pairs.items()})
    sides = (
        Side(base, wanted, model_types(configs[0])),
        Side(own, held, model_types(configs[1])),
    )
    views = _chosen(sides, label)
    for name, view in views.items():
        check_one_dtype(name, view, own, label)
    return {
        name: view for name, view in views.items() if not _unchanged(name, view, met, base, own)
    }


def layout_readings(views: Mapping[str, View]) -> list[Reading]:
    """Return what tensors of other layouts were read as, by patterns of names."""
    met: Counter[tuple[str, str]] = Counter()
    for name, view in views.items():
        own = sorted({layer_group(key) for key in view.keys})
        met[", ".join(own), layer_group(name)] += 1
    return [Reading(own, base, count) for (own, base), count in met.items()]


def _swapped(one: TensorEntry, other: TensorEntry) -> bool:
    if len(one.shape) != 3 or len(other.shape) != 3 or one.shape == other.shape:
        return False
    return one.shape == (other.shape[0], other.shape[2], other.shape[1])


def _packings(
    names: Sequence[str], entries: Mapping[str, TensorEntry], form: Callable[[str], str]
) -> dict[str, Packing]:
    found = {n: packing(form(n), len(entries[n].shape)) for n in names}
    return {name: how for name, how in found.items() if how is not None}


def _unchanged(
    name: str,
    view: View,
    met: Mapping[str, str],
    base: Mapping[str, TensorEntry],
    own: Mapping[str, TensorEntry],
) -> bool:
    """Tell whether a view is nothing but the tensor that meets the name as it is."""
    key = met.get(name)
    if key is None or own[key].shape != base[name].shape:
        return False
    return view.turned == view.matrices[0][0].turned


def _chosen(sides: tuple[Side, Side], label: str) -> dict[str, View]:
    """Return the views under the order of axes, in base and expert, that lets most tensors fit."""
    tried: dict[tuple[bool, bool], dict[str, View]] = {}
    for orders in ((False, False), (True, True), (False, True), (True, False)):
        if all(
            order is False or _has_stacks(side) for order, side in zip(orders, sides, strict=True)
        ):
            tried[orders] = _composed(sides, orders, label)
    most = max(len(views) for views in tried.values())
    if most == 0:
        return {}
    best = {orders: views for orders, views in tried.items() if len(views) == most}
    best = {o: v for o, v in best.items() if _as_known(o, sides)} or best
    first, *others = [_effect(views) for views in best.values()]
    if any(other != first for other in others):
        name = next(iter(next(iter(best.values()))))
        raise CheckpointError(
            f"{label}: '{name}' of the base can be made of its tensors in two ways: its stacks of "
            "matrices may be [E, out, in] or [E, in, out], and the shapes fit both.\n"
            "Give base and expert a config.json with their model_type, or save both in one layout."
        )
    return next(iter(best.values()))


def _has_stacks(side: Side) -> bool:
    return any(p.stacked and p.kind == "weight" for p in side.packings.values())


def _as_known(orders: tuple[bool, bool], sides: tuple[Side, Side]) -> bool:
    """Tell whether the order of axes is that of the model types that are known."""
    for inputs_first, side in zip(orders, sides, strict=True):
        if not _has_stacks(side):
            continue
        if side.models & (OUTPUTS_FIRST if inputs_first else INPUTS_FIRST):
            return False
    return True


def _effect(views: Mapping[str, View]) -> dict[str, object]:
    """Return what tells two ways to make the tensors apart: where each element comes from."""
    return {
        name: [
            (piece.key, piece.start, piece.turned != view.turned)
            if _is_all(view, piece)
            else (piece, view.turned)
            for piece in view.matrices[0]
        ]
        for name, view in views.items()
    }


def _is_all(view: View, piece: Piece) -> bool:
    rows = view.shape[1] if view.turned else view.shape[0]
    whole = slice(0, rows)
    return piece.put == whole and piece.take == whole


def _composed(sides: tuple[Side, Side], orders: tuple[bool, bool], label: str) -> dict[str, View]:
    """Return the views of all tensors of the base that the expert's matrices make up."""
    base, own = sides
    held: dict[tuple[str, str, int | None], list[_Held]] = {}
    for key, how in own.packings.items():
        entry = own.entries[key]
        numbers = range(entry.shape[0]) if how.stacked else [0]
        for number in numbers:
            expert = number if how.stacked else how.expert
            found = _Held(entry, how, number)
            held.setdefault((how.group, how.kind, expert), []).append(found)
    siblings: dict[tuple[str, str, int | None], dict[str, int]] = {}
    for name, how in base.packings.items():
        if not how.stacked and len(how.roles) == 1:
            place = (how.group, how.kind, how.expert)
            siblings.setdefault(place, {})[how.roles[0]] = base.entries[name].shape[0]
    views: dict[str, View] = {}
    counts = [_expert_counts(side) for side in sides]
    for name, how in base.packings.items():
        if counts[0][how.group] != counts[1].get(how.group):
            continue  # another number of experts: another model
        entry = base.entries[name]
        experts = range(entry.shape[0]) if how.stacked else [how.expert]
        shape = _matrix_shape(entry, how)
        turned = how.stacked and how.kind == "weight" and orders[0]
        rows, columns = shape[::-1] if turned else shape
        matrices: list[tuple[Piece, ...]] = []
        for expert in experts:
            place = (how.group, how.kind, expert)
            sizes = siblings.get(place, {})
            found = held.get(place, [])
            pieces = _pieces(how, (rows, columns), found, sizes, sides, orders[1], label)
            if pieces is None:
                break
            matrices.append(pieces)
        else:
            if matrices:
                views[name] = View(shape, turned, tuple(matrices))
    return _using_all(views, own.entries)


def _expert_counts(side: Side) -> dict[str, int]:
    """Return how many experts each mixture has; none where it is a single layer."""
    numbers: dict[str, set[int]] = {}
    for name, how in side.packings.items():
        found = range(side.entries[name].shape[0]) if how.stacked else [how.expert]
        numbers.setdefault(how.group, set()).update(n for n in found if n is not None)
    return {group: len(found) for group, found in numbers.items()}


def _using_all(views: dict[str, View], own: Mapping[str, TensorEntry]) -> dict[str, View]:
    """Leave out views that use a tensor of which something would be left behind."""
    used: Counter[str] = Counter()
    for view in views.values():
        for pieces in view.matrices:
            for piece in pieces:
                height, width = _logical(piece)
                used[piece.key] += len(range(*piece.take.indices(height))) * width
    partly = {key for key, count in used.items() if count != own[key].numel}
    return {name: view for name, view in views.items() if not partly & view.keys}


def _matrix_shape(entry: TensorEntry, how: Packing) -> tuple[int, int]:
    """Return the stored shape of one matrix; of a bias, a column."""
    shape = entry.shape[1:] if how.stacked else entry.shape
    return (shape[0], math.prod(shape[1:]))


def _pieces(
    how: Packing,
    shape: tuple[int, int],
    held: Sequence[_Held],
    sizes: Mapping[str, int],
    sides: tuple[Side, Side],
    inputs_first: bool,
    label: str,
) -> tuple[Piece, ...] | None:
    """Return the pieces of one matrix of the base, None where they do not make it up."""
    rows, columns = shape
    by_role: dict[str, _Held] = {}
    for found in held:
        for role in found.packing.roles:
            if role in how.roles and role in by_role:
                raise CheckpointError(
                    f"{label}: '{by_role[role].entry.name}' and '{found.entry.name}' both hold the "
                    f"{role} matrix of '{how.group}'.\nLeave out the wrong one."
                )
            by_role[role] = found
    if not all(role in by_role for role in how.roles):
        return None
    found = by_role[how.roles[0]]
    same = found.packing.roles == how.roles
    if same:
        piece = _piece(found, inputs_first, None, None)
        return (piece,) if _logical(piece) == (rows, columns) else None
    pieces: list[Piece] = []
    if len(how.roles) == 1:  # a part of a fused matrix of the expert
        role, roles = how.roles[0], found.packing.roles
        height = _logical(_piece(found, inputs_first, None, None))[0]
        parts = [sizes.get(r, -1) for r in roles] if roles != GATE_UP else [height // 2] * 2
        if sum(parts) != height or min(parts) < 0 or parts[roles.index(role)] != rows:
            return None
        take = _rows(roles.index(role), parts, _alternate(roles, sides[1], sides[0], found, label))
        pieces = [_piece(found, inputs_first, take, slice(0, rows))]
    else:  # a fused matrix of the base, of single ones
        singles = [by_role[role] for role in how.roles]
        if any(len(single.packing.roles) != 1 for single in singles):
            return None
        heights = [_logical(_piece(single, inputs_first, None, None))[0] for single in singles]
        if sum(heights) != rows or (how.roles == GATE_UP and len(set(heights)) > 1):
            return None
        alternate = _alternate(how.roles, sides[0], sides[1], None, label, how)
        for position, (single, height) in enumerate(zip(singles, heights, strict=True)):
            put = _rows(position, heights, alternate)
            pieces.append(_piece(single, inputs_first, slice(0, height), put))
    return tuple(pieces) if all(_logical(p)[1] == columns for p in pieces) else None


def _piece(found: _Held, inputs_first: bool, take: slice | None, put: slice | None) -> Piece:
    shape = _matrix_shape(found.entry, found.packing)
    turned = inputs_first and found.packing.stacked and found.packing.kind == "weight"
    height = shape[1] if turned else shape[0]
    everything = slice(0, height)
    start = found.number * shape[0] * shape[1]
    return Piece(found.entry.name, start, shape, turned, take or everything, put or everything)


def _logical(piece: Piece) -> tuple[int, int]:
    """Return [out, in] of the stored matrix."""
    rows, columns = piece.shape
    return (columns, rows) if piece.turned else (rows, columns)


def _rows(position: int, heights: Sequence[int], alternate: bool) -> slice:
    if alternate:
        return slice(position, sum(heights), len(heights))
    return slice(sum(heights[:position]), sum(heights[: position + 1]))


def _alternate(
    roles: tuple[str, ...],
    fused: Side,
    single: Side,
    found: _Held | None,
    label: str,
    how: Packing | None = None,
) -> bool:
    """Tell whether the fused rows alternate, by the model type of the side that fuses them.

    gpt-oss has the only such rule that is public; biases of gate and up in one are its habit, so
    without any model type they decide nothing.
    """
    if roles != GATE_UP:
        return False
    models = fused.models or single.models
    if models:
        return bool(models & ALTERNATING)
    if any(p.kind == "bias" and p.roles == GATE_UP for p in fused.packings.values()):
        raise CheckpointError(
            f"{label}: rows of gate and up are fused, and without a model type they can be read in "
            "two ways: one after the other, or alternating (gpt_oss).\n"
            "Give base and expert a config.json with their model_type."
        )
    return False
