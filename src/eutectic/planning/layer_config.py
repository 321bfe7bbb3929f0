"""The configuration of an output whose layers are those of several models: it follows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from eutectic.conventions_stacks import (
    LAYER_LISTS,
    depth_keys,
    is_for_stack,
    layer_of,
    main_stacks,
)
from eutectic.planning.inputs import Inputs
from eutectic.recipes.script import Script

Edit = tuple[tuple[str, ...], Any]  # path of a key in the configuration, and its value


def layer_edits(inputs: Inputs, script: Script) -> tuple[Edit, ...]:
    """Return what the configuration has to say of an output's layers.

    The number of layers; lists of one value per layer, such as `layer_types`, each value from the
    model and layer that the layer is like; and lists of layers' numbers, such as
    `mlp_only_layers`, which hold a number where the layer that it is like is listed.
    """
    edits: list[Edit] = []
    for part in script.bands:
        stack, sources = _layers(inputs, part)
        for path, config in _parts(inputs.config):
            if not is_for_stack(stack, path[-1] if path else ""):
                continue
            keys = [key for key in depth_keys(stack) if _is_count(config.get(key))]
            if not keys and not inputs.config.get("is_encoder_decoder"):
                keys = [key for key in depth_keys("") if _is_count(config.get(key))]
            if keys:
                edits += [((*path, key), len(sources)) for key in keys]
                edits += _lists(path, config, int(config[keys[0]]), sources, inputs)
                break
    return tuple(edits)


def _layers(inputs: Inputs, part: str) -> tuple[str, list[tuple[str, int]]]:
    """Return the stack of layers that was put together, and (model, layer) of each."""
    rows = {n: row for n, row in inputs.rows.items() if row.place.module == part}
    (stack,) = main_stacks(rows)[:1] or [""]
    found: dict[int, tuple[str, int]] = {}
    for name, row in rows.items():
        out, own = layer_of(name), layer_of(row.like[1])
        if out is not None and out[0] == stack and own is not None:
            found.setdefault(out[1], (row.like[0], own[1]))
    return stack, [found[n] for n in sorted(found)]


def _parts(config: Mapping[str, Any]) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Return the configuration and those of its parts, innermost first."""
    inner = [
        ((key,), cast("Mapping[str, Any]", value))
        for key, value in config.items()
        if isinstance(value, Mapping)
    ]
    return [*inner, ((), config)]


def _lists(
    path: tuple[str, ...],
    part: Mapping[str, Any],
    depth: int,
    sources: Sequence[tuple[str, int]],
    inputs: Inputs,
) -> list[Edit]:
    edits: list[Edit] = []
    for key, value in part.items():
        if not isinstance(value, list):
            continue
        items = cast("list[Any]", value)
        if key in LAYER_LISTS:
            held = [
                n for n, (owner, k) in enumerate(sources) if k in _list(inputs, owner, path, key)
            ]
            edits.append(((*path, key), held))
        elif len(items) == depth:
            made = [_item(_list(inputs, owner, path, key), k) for owner, k in sources]
            edits.append(((*path, key), made))
    return edits


def _list(inputs: Inputs, owner: str, path: tuple[str, ...], key: str) -> list[Any]:
    config = inputs.config if owner == "base" else inputs.configs.get(owner, inputs.config)
    for step in path:
        inner = config.get(step)
        config = cast("Mapping[str, Any]", inner) if isinstance(inner, Mapping) else {}
    found = config.get(key)
    if not isinstance(found, list):
        return _list(inputs, "base", path, key) if owner != "base" else []
    return cast("list[Any]", found)


def _item(items: list[Any], place: int) -> Any:
    return items[place] if place < len(items) else items[-1]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def with_edits(config: Mapping[str, Any], edits: Sequence[Edit]) -> dict[str, Any]:
    """Return a configuration with other values."""
    changed = dict(config)
    for path, value in edits:
        place = changed
        for step in path[:-1]:
            place[step] = dict(place[step])
            place = place[step]
        place[path[-1]] = value
    return changed
