"""Adapters of bare parameters, which mixtures keep as stacks of matrices.

PEFT wraps a parameter in a layer whose factors are those of all matrices side by side. Wrappers of
one module's parameters lie in each other, and their keys say no more than how deep; shapes tell
which parameter each adapts, and how the stack keeps its axes. The base may keep the same matrices
one by one: then they are put together as for a checkpoint (`layouts`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import TYPE_CHECKING, Any

from eutectic.checkpoint.adapter_keys import Group, Grouped, bare_parameters
from eutectic.checkpoint.arranged import Arranged, View
from eutectic.checkpoint.changes import (
    ArrangedChange,
    Change,
    ChangedModel,
    PackedProducts,
    entry_of_change,
    kept,
)
from eutectic.checkpoint.header import TensorEntry
from eutectic.checkpoint.layouts import model_types, rearranged
from eutectic.checkpoint.names import Alignment
from eutectic.conventions_layouts import INPUTS_FIRST, packing
from eutectic.errors import CheckpointError

if TYPE_CHECKING:
    from eutectic.checkpoint.reader import TensorSource

_SWAPPED_SINCE = (0, 19)  # PEFT took the axes of stacks in this order first, whatever they were
_AS_OUTPUTS_FIRST, _AS_INPUTS_FIRST = "mixtral", "llama4"  # models whose order is known


@dataclass(frozen=True)
class BareAdapter:
    """What is known of an adapter when its bare parameters are looked for."""

    source: "TensorSource"
    found: Grouped
    parameters: Sequence[str]  # as its configuration names them
    ranks: Mapping[str, int]  # of every bare parameter that it may mean
    scalings: Mapping[str, float]
    version: str  # of PEFT, "" where it does not say
    label: str

    def candidates(self, module: str) -> list[str]:
        """Return the parameters of a module that are adapted."""
        return [f"{module}.{name}" for name in bare_parameters(module, self.parameters)]


@dataclass(frozen=True)
class MetBase:
    """The base, and which of an adapter's names meet its own."""

    entries: Mapping[str, TensorEntry]
    config: Mapping[str, Any]
    mapping: Mapping[str, str]  # name in the adapted model -> name of the base
    alignment: Alignment

    @cached_property
    def mixtures(self) -> Mapping[str, Mapping[str, TensorEntry]]:
        """The tensors that hold matrices of mixtures, by module."""
        found: dict[str, dict[str, TensorEntry]] = {}
        for name, entry in self.entries.items():
            how = packing(self.alignment.form_of_name(name).name, len(entry.shape))
            if how is not None:
                found.setdefault(how.group, {})[name] = entry
        return found


@dataclass(frozen=True)
class BareChanges:
    """Where bare parameters meet the base."""

    changes: Mapping[str, Change]  # name of the base -> change
    pairs: Mapping[str, Group]  # single matrices, by their names in the base: ordinary factors
    read: Mapping[str, tuple[TensorEntry, ...]]  # name of the base -> what is read of the adapter


def meet_bare(adapter: BareAdapter, base: MetBase) -> BareChanges:
    """Return the changes of an adapter's bare parameters."""
    changes: dict[str, Change] = {}
    pairs: dict[str, Group] = {}
    read: dict[str, tuple[TensorEntry, ...]] = {}
    apart: dict[str, Group] = {}
    for module, groups in adapter.found.bare.items():
        for own, group in _named(adapter, module, groups, base).items():
            if own not in base.mapping:
                apart[own] = group
                continue
            name = base.mapping[own]
            shape = base.entries[name].shape
            if len(shape) == 2:
                pairs[name] = group
                continue
            read[name] = (group["lora_A"], group["lora_B"])
            turned = _turned(adapter, group, shape, base)
            assert turned is not None
            changes[name] = _products(adapter, own, group, name, turned)
    if apart:
        views = _views(adapter, apart, base)
        made = {own: _products(adapter, own, g, own, False) for own, g in apart.items()}
        model = ChangedModel(made, [_entry(adapter, own, g) for own, g in apart.items()])
        arranged = Arranged(model, views, {name: base.entries[name].shape for name in views})
        for name, view in views.items():
            changes[name] = ArrangedChange(name, arranged)
            read[name] = tuple(e for key in sorted(view.keys) for e in apart[key].values())
    return BareChanges(changes, pairs, read)


def _named(
    adapter: BareAdapter, module: str, groups: Mapping[int, Group], base: MetBase
) -> dict[str, Group]:
    """Return which parameter each wrapper of a module adapts."""
    for group in groups.values():
        if group.keys() != {"lora_A", "lora_B"}:
            held = ", ".join(sorted(group))
            raise CheckpointError(f"{adapter.label}: '{module}' has {held} only of its factors.")
    fitting: list[dict[str, Group]] = []
    for order in permutations(adapter.candidates(module), len(groups)):
        chosen = dict(zip(order, groups.values(), strict=True))
        if all(_fits(adapter, own, group, base) for own, group in chosen.items()):
            apart = {own: group for own, group in chosen.items() if own not in base.mapping}
            if not apart or _views(adapter, apart, base):
                fitting.append(chosen)
    if len(fitting) == 1:
        return fitting[0]
    shapes = "; ".join(
        f"{list(g['lora_A'].shape)} and {list(g['lora_B'].shape)}" for g in groups.values()
    )
    what = "fit more than one of them" if fitting else "fit none that the base has"
    raise CheckpointError(
        f"{adapter.label}: the factors of bare parameters of '{module}' ({shapes}) {what}: "
        f"{', '.join(adapter.candidates(module))}.\n"
        "Merge the adapter with peft (merge_and_unload) into the model it was trained on, save "
        "that, and name the result."
    )


def _fits(adapter: BareAdapter, own: str, group: Group, base: MetBase) -> bool:
    rows, rank = group["lora_A"].shape[0], adapter.ranks[own]
    if rows % rank or group["lora_B"].shape[1] != rows:
        return False
    if own not in base.mapping:
        return True
    shape = base.entries[base.mapping[own]].shape
    if len(shape) == 2:
        a, b = group["lora_A"].shape, group["lora_B"].shape
        return rows == rank and shape == (b[0], a[1])
    experts = len(shape) == 3 and shape[0] * rank == rows
    return experts and _turned(adapter, group, shape, base) is not None


def _turned(
    adapter: BareAdapter, group: Group, shape: tuple[int, ...], base: MetBase
) -> bool | None:
    """Tell whether a stack keeps each product turned; None where the shapes do not fit."""
    out, width = group["lora_B"].shape[0], group["lora_A"].shape[1]
    straight, turned = shape[1:] == (out, width), shape[1:] == (width, out)
    if straight and turned:
        inputs_first = bool(model_types(base.config) & INPUTS_FIRST)
        return inputs_first if _swaps(adapter.version) else True
    return turned if straight or turned else None


def _swaps(version: str) -> bool:
    """Tell whether this version of PEFT knows that most stacks are [E, out, in]."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= _SWAPPED_SINCE


def _products(
    adapter: BareAdapter, own: str, group: Group, name: str, turned: bool
) -> PackedProducts:
    a, b = group["lora_A"], group["lora_B"]
    experts = a.shape[0] // adapter.ranks[own]
    scaling = adapter.scalings[own]
    return PackedProducts(name, adapter.source, a, b, experts, scaling, turned, kept(), kept())


def _entry(adapter: BareAdapter, own: str, group: Group) -> TensorEntry:
    a, b = group["lora_A"], group["lora_B"]
    shape = (a.shape[0] // adapter.ranks[own], b.shape[0], a.shape[1])
    return entry_of_change(own, shape, a)


def _views(adapter: BareAdapter, apart: Mapping[str, Group], base: MetBase) -> dict[str, View]:
    """Return how tensors of the base are made of stacks of changes; {} where one is left over."""
    aligned = base.alignment
    entries = {own: _entry(adapter, own, group) for own, group in apart.items()}
    groups = {how.group for own in apart if (how := packing(aligned.form_of_key(own).name, 3))}
    held = {n: e for group in groups for n, e in base.mixtures.get(group, {}).items()}
    known = bool(model_types(base.config) & INPUTS_FIRST) or _swaps(adapter.version)
    order = {"model_type": _AS_OUTPUTS_FIRST if known else _AS_INPUTS_FIRST}
    forms = (lambda n: aligned.form_of_name(n).name, lambda k: aligned.form_of_key(k).name)
    views = rearranged((held, entries), {}, forms, (base.config, order), adapter.label)
    used = frozenset[str]().union(*(view.keys for view in views.values()))
    return views if used == entries.keys() else {}
