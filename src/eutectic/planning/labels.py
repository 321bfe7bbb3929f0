"""Heads that are merged although their outputs stand for other classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from eutectic.conventions import classification_head
from eutectic.errors import Note
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.recipes.schema import Recipe
from eutectic.types import Treatment

Difference = tuple[int, str, str]  # an output, its class, and its class in the reference

_NAMELESS = re.compile(r"LABEL_\d+")


def label_warnings(tensors: Sequence[TensorPlan], recipe: Recipe, inputs: Inputs) -> list[Note]:
    """Return a warning where one head is merged from outputs that stand for other classes.

    A head is a tensor under a usual name with as many rows as its model has classes. Class names
    are those of the config.json files, compared without case; a model that names none is left out,
    as are adapters. Names may differ and mean the same, so that this is no fault.
    """
    classes = {"the base": class_names(inputs.config)}
    classes |= {f"'{name}'": class_names(e.config) for name, e in inputs.experts.items()}
    donor = "the base" if recipe.side_files == "base" else f"'{recipe.side_files}'"
    found: dict[tuple[str, tuple[tuple[str, Difference], ...]], list[str]] = {}
    for planned in tensors:
        if planned.treatment in (Treatment.COPY, Treatment.HEAD):
            continue
        if not planned.shape or classification_head(planned.name) is None:
            continue
        owners = [source.owner for source in planned.experts]
        having = [f"'{n}'" for n in owners if planned.name in inputs.experts[n].entries]
        # The model whose label2id the output keeps comes first, if it names its classes.
        order = sorted(dict.fromkeys(["the base", *having]), key=lambda owner: owner != donor)
        known = [(o, n) for o in order if (n := classes[o]) and len(n) == planned.shape[0]]
        if not known:
            continue
        (owner, wanted), *others = known
        differ = tuple((o, _difference(n, wanted)) for o, n in others if n != wanted)
        if differ:
            found.setdefault((owner, differ), []).append(planned.name)
    return [
        Note(
            "mixed_classes",
            tuple(names),
            {"reference": owner, "differ": dict(differ), "heads": _head_patterns(names)},
            level="warning",
        )
        for (owner, differ), names in found.items()
    ]


def class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return a model's class names in the order of its outputs, None where it names none.

    `LABEL_0` and the like, which transformers makes up, are no names; neither is that of a single
    output.
    """
    names, numbers = config.get("id2label"), config.get("label2id")
    if isinstance(names, Mapping):
        pairs = [(i, name) for i, name in cast("Mapping[Any, Any]", names).items()]
    elif isinstance(numbers, Mapping):
        pairs = [(i, name) for name, i in cast("Mapping[Any, Any]", numbers).items()]
    else:
        return None
    try:
        by_index = {int(i): str(name).strip().casefold() for i, name in pairs}
    except (TypeError, ValueError):
        return None
    if len(by_index) < 2 or set(by_index) != set(range(len(by_index))):
        return None
    if any(_NAMELESS.fullmatch(str(name)) for _, name in pairs):
        return None
    return tuple(by_index[i] for i in range(len(by_index)))


def _difference(names: tuple[str, ...], wanted: tuple[str, ...]) -> Difference:
    pairs = enumerate(zip(names, wanted, strict=True))
    return next((i, own, other) for i, (own, other) in pairs if own != other)


def _head_patterns(names: Sequence[str]) -> tuple[str, ...]:
    """Return patterns for rules that match every tensor of these heads."""
    return tuple(dict.fromkeys(f"{classification_head(name)}.*" for name in names))
