"""Which tensors an output has whose layers come from several models, and who holds each.

A recipe's bands say which layers of which models make the layers of the output. Here they meet the
tensors that are there: each tensor of the output gets a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.restacked import Restacked, restacked
from eutectic.conventions import is_output_vocabulary, is_token_embedding
from eutectic.conventions_stacks import (
    at_layer,
    belongs_to,
    layer_of,
    main_stacks,
    stack_depths,
    stands_before_layers,
)
from eutectic.conventions_ties import is_tied
from eutectic.errors import Fault
from eutectic.recipes.script import Band, Place, Script


@dataclass(frozen=True)
class Row:
    """One tensor of the output: what it is like, where every model keeps it, and its place."""

    like: tuple[str, str]  # (model, tensor) that it has shape, dtype and base values of
    place: Place


Rows = Mapping[str, Row]


def rows_of(script: Script, models: Mapping[str, Expert]) -> Rows | list[Fault]:
    """Return a row for each tensor of the output, in the order of its layers.

    `models` are all that a band may name, by name; "base" is the recipe's base.
    """
    names = list(_names(models["base"]))
    rows: dict[str, Row] = {}
    faults: list[Fault] = []
    parts = script.takes.keys() | script.bands.keys()
    for part, bands in script.bands.items():
        own = [n for n in names if belongs_to(n, part)]
        found = _part_rows(part, own, bands, models)
        if isinstance(found, list):
            faults += found
        else:
            rows.update(found)
    for name in names:
        if name in rows or any(belongs_to(name, part) for part in script.bands):
            continue
        part = next((p for p in parts if belongs_to(name, p)), None)
        takers = script.takes.get(part or "", ()) if part is not None else ()
        own = {owner: name for owner in takers if owner in models and _has(models[owner], name)}
        depth = depth_in(name, stack_depths(names))
        rows[name] = Row(("base", name), Place(name, own, depth, part or ""))
    return faults or rows


def _names(model: Expert) -> Iterable[str]:
    return (*model.entries, *model.extra)


def _has(model: Expert, name: str) -> bool:
    return name in model.entries or name in model.extra


def _part_rows(
    part: str, names: list[str], bands: tuple[Band, ...], models: Mapping[str, Expert]
) -> dict[str, Row] | list[Fault]:
    stacks = main_stacks(names)
    line = bands[0].line
    where = f"modules.{part}" if part else "slices"
    if len(stacks) != 1:
        listed = ", ".join(stacks) or "none"
        what = f"the model has {len(stacks)} stacks of layers ({listed}), so it is not clear whose."
        choose = "Write the slices of each under modules, such as encoder and decoder."
        return [Fault("stacks", what, where, line, next=choose if stacks else "")]
    (stack,) = stacks
    layers: dict[str, dict[int, list[str]]] = {}
    for owner in {o for band in bands for o in _owners(band)}:
        layers[owner] = _layers(models[owner], stack)
    faults = _depth_faults(bands, layers, where)
    if faults:
        return faults
    rows: dict[str, Row] = {}
    outer = [n for n in names if _stack(n) != stack]
    before = [n for n in outer if stands_before_layers(n) or _stack(n) is not None]
    behind = [n for n in outer if n not in set(before)]
    rows.update(_loose(before, 0, bands, models, part))
    first = 0
    for number, band in enumerate(bands):
        like = band.base or next(iter(band.takes.items()))
        for step in range(band.count):
            depth = step / (band.count - 1) if band.count > 1 else 1.0
            for name in layers[like[0]].get(like[1] + step, ()):
                out = at_layer(name, first + step)
                own = {o: at_layer(name, start + step) for o, start in band.takes.items()}
                own = {o: n for o, n in own.items() if _has(models[o], n)}
                rows[out] = Row((like[0], name), Place(out, own, depth, part, number))
        first += band.count
    heads = [n for o in _owners(bands[-1]) for n in models[o].extra if _is_head(n)]
    behind = list(dict.fromkeys([*behind, *(n for n in heads if belongs_to(n, part))]))
    rows.update(_loose(behind, len(bands) - 1, bands, models, part))
    return rows


def _loose(
    names: list[str], number: int, bands: tuple[Band, ...], models: Mapping[str, Expert], part: str
) -> dict[str, Row]:
    """Return the rows of tensors outside the layers, which a band's models hold."""
    band = bands[number]
    first = (band.base or next(iter(band.takes.items())))[0]
    rows: dict[str, Row] = {}
    for name in names:
        own = {o: kept for o in band.takes if (kept := _kept(models[o], name)) is not None}
        like = _kept(models[first], name)
        if like is None and not own:
            continue
        owner = first if like is not None else next(iter(own))
        rows[name] = Row((owner, like or own[owner]), Place(name, own, 0.0, part, number))
    return rows


def _is_head(name: str) -> bool:
    return layer_of(name) is None and is_output_vocabulary(name)


def _kept(model: Expert, name: str) -> str | None:
    """Return under which name a model keeps a tensor outside the layers, None where it has none."""
    if _has(model, name):
        return name
    if is_output_vocabulary(name) and is_tied(model.config):
        return next((n for n in _names(model) if is_token_embedding(n)), None)
    return None


def _owners(band: Band) -> set[str]:
    return {*band.takes, *([band.base[0]] if band.base else [])}


def _stack(name: str) -> str | None:
    found = layer_of(name)
    return None if found is None else found[0]


def _layers(model: Expert, stack: str) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name in _names(model):
        place = layer_of(name)
        if place is not None and place[0] == stack:
            found.setdefault(place[1], []).append(name)
    return found


def _depth_faults(
    bands: Iterable[Band], layers: Mapping[str, dict[int, list[str]]], where: str
) -> list[Fault]:
    faults: list[Fault] = []
    for band in bands:
        for owner, start in [*band.takes.items(), *([band.base] if band.base else [])]:
            depth = max(layers[owner], default=-1) + 1
            if start + band.count > depth:
                asked = f"[{start}, {start + band.count}]"
                what = f"{_called(owner)} has {depth} layers."
                faults.append(Fault("other_depth", what, where, band.line, got=asked))
    return faults


def _called(owner: str) -> str:
    return "the base" if owner == "base" else f"'{owner}'"


def depth_in(name: str, depths: Mapping[str, int]) -> float:
    """Return how deep in its stack a tensor lies, 0 outside of any, 1 in a stack of one layer."""
    found = layer_of(name)
    if found is None:
        return 0.0
    count = depths[found[0]]
    return found[1] / (count - 1) if count > 1 else 1.0


def restack(rows: Rows, models: Mapping[str, Expert]) -> tuple[Restacked, dict[str, Expert]]:
    """Return the base and the models of an output under its names."""
    base = Restacked({n: (models[row.like[0]], row.like[1]) for n, row in rows.items()})
    own: dict[str, dict[str, str]] = {}
    for name, row in rows.items():
        for owner, kept in row.place.own.items():
            own.setdefault(owner, {})[name] = kept
    return base, {owner: restacked(models[owner], names) for owner, names in own.items()}
