"""How the input Grams of a statistics file are kept, and what the directions of a Gram leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eutectic.statistics.statistics_file import StatisticsFile, core_ranks
from eutectic.statistics.tensor_file import entries_of
from eutectic.types import gram_names


@dataclass(frozen=True)
class GramForm:
    """How one layer's input Gram is kept.

    Attributes:
        layers: the parameters that share it.
        width: inputs of the layer.
        tokens: that were seen.
        directions: rows F that stand for it, FᵀF plus a diagonal where `beside` is a number; None
            for the whole matrix.
        beside: share of the Gram's trace that is on that diagonal. FᵀF lies below the Gram, so that
            this is its error in nuclear norm, exactly, and bounds it in any other.
        adapters: for how many adapters' inputs alone it was collected; None for whole inputs.
        nbytes: in the file.
    """

    layers: tuple[str, ...]
    width: int
    tokens: int
    directions: int | None
    beside: float | None
    adapters: int | None
    nbytes: int


def gram_forms(held: StatisticsFile) -> list[GramForm]:
    """Return the form of every input Gram in the order of the layers; no tensor is read."""
    layers: Mapping[str, Mapping[str, Any]] = held.provenance["layers"]
    shares: Mapping[str, float] = held.provenance.get("beside_directions") or {}
    ranks = core_ranks(held.provenance)
    shapes = {name: (dtype, shape) for name, dtype, shape in entries_of(held.tensors)}
    sharing: dict[str, list[str]] = {}
    for name, own in layers.items():
        sharing.setdefault(own["inputs"] or name, []).append(name)
    found: list[GramForm] = []
    for owner, names in sharing.items():
        for statistic in ("gram", "core_gram"):
            stored = [f"{owner}/{part}" for part in gram_names(statistic)]
            kept = [shapes[key] for key in stored if key in shapes]
            if not kept:
                continue
            form = GramForm(
                layers=tuple(names),
                width=int(layers[owner]["shape"][-1]),
                tokens=int(layers[owner]["count"]),
                directions=None if stored[0] in shapes else int(shapes[stored[1]][1][0]),
                beside=shares.get(owner),
                adapters=len(ranks.get(owner, [])) if statistic == "core_gram" else None,
                nbytes=sum(_bytes(dtype.itemsize, shape) for dtype, shape in kept),
            )
            found.append(form)
    return found


def _bytes(itemsize: int, shape: tuple[int, ...]) -> int:
    for length in shape:
        itemsize *= length
    return itemsize
