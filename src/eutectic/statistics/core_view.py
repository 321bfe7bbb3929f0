"""Statistics that were collected for adapters, as a merge of these adapters reads them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.expert_tensors import Expert
from eutectic.errors import StatisticsError
from eutectic.linalg.core import core_root, pseudo_inverse
from eutectic.statistics.statistics_file import StatisticsFile
from eutectic.types import LayerStatistics, Statistics
from eutectic.words import few

_KEPT = (
    4  # layers, each with as many rows as there are directions: all experts ask for them in turn
)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows A `[R, in]` of several adapters, in float64, and what is made of them once."""

    stacked: Tensor
    owners: frozenset[str]

    @cached_property
    def inverse(self) -> Tensor:
        """(A⁺)ᵀ `[R, in]`."""
        return pseudo_inverse(self.stacked)


class AdapterRows:
    """The rows of the adapters of one merge, read once for all of their statistics."""

    def __init__(self, experts: Mapping[str, Expert]) -> None:
        self.experts = experts
        self._kept: OrderedDict[tuple[str, tuple[str, ...]], _Rows] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def fingerprints(self) -> dict[str, str | None]:
        """The identity of each adapter's content, None for what is none."""
        return {n: e.fingerprint() if e.is_delta else None for n, e in self.experts.items()}

    def read(self, parameter: str, names: tuple[str, ...]) -> _Rows | None:
        """Return the rows of some adapters one above the other; None where none acts."""
        with self._lock:
            found = self._kept.get((parameter, names))
            if found is not None:
                return found
            own = {name: self.experts[name].input_rows(parameter) for name in names}
            rows = {name: each.double() for name, each in own.items() if each is not None}
            if not rows:
                return None
            found = _Rows(torch.cat([*rows.values()]), frozenset(rows))
            self._kept[parameter, names] = found
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return found


class CoreStatistics:
    """Statistics for adapters as a merge of these adapters reads them: input Grams of few rows.

    Of a Gram C they show P·C·P, with P the projector onto the rows of the adapters that are merged:
    as `gram_factor`, whose rows lie in their span, or as `core_gram` and `core_rows` where these
    are asked for. Nothing else of C can reach a core of them.
    """

    def __init__(self, file: StatisticsFile, rows: AdapterRows, owner: str) -> None:
        self._file = file
        self._rows = rows
        stated: Mapping[str, Any] = file.provenance["settings"]["core"]
        self._ranks: Mapping[str, Sequence[int]] = stated["ranks"]
        self._base_names: Mapping[str, str] = stated["base_names"]
        known = {entry["fingerprint"]: i for i, entry in enumerate(stated["adapters"])}
        places = {name: known.get(print_ or "") for name, print_ in rows.fingerprints.items()}
        self._names = {place: name for name, place in places.items() if place is not None}
        others = [name for name, place in places.items() if place is None]
        if others:
            named = [str(entry["name"]) for entry in stated["adapters"]]
            raise StatisticsError(
                f"the statistics of '{owner}' were collected for the adapters {few(named)} alone, "
                f"and {few(others)} is none of them.\n"
                "Collect them with --for of every adapter that is merged, or without --for."
            )

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the file says about itself."""
        return self._file.provenance

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the checkpoint that they were collected on."""
        return self._file.fingerprint

    @property
    def samples(self) -> Mapping[str, Tensor]:
        """A few values of each parameter."""
        return self._file.samples

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __contains__(self, name: object) -> bool:
        return name in self._file

    def has(self, name: str, statistic: str) -> bool:
        """Tell whether a parameter has a statistic; of these, the Gram alone."""
        return statistic == "gram" and self._file.has(name, "core_gram")

    def read(
        self, name: str, only: Collection[str] | None = None, *, in_rows: bool = False
    ) -> LayerStatistics:
        """Return the Gram of one parameter, between the rows of the adapters that are merged.

        With "core_gram" in `only` it comes as `core_gram` and `core_rows`, of which the methods
        that take them so make no matrix as wide as the layer; else as `gram_factor`. It comes in
        rows whatever `in_rows` says.
        """
        del in_rows
        if only is not None and "gram" not in only:
            return _bare(self._file.read(name, ()))
        entry = self._file.read(name, ("core_gram",))
        if entry.core_gram is None:
            return _bare(entry)
        ranks = self._ranks[name]
        starts = [sum(ranks[:i]) for i in range(len(ranks))]
        acting = [(place, own) for place, own in sorted(self._names.items()) if ranks[place]]
        rows = self._rows.read(self._base_names[name], tuple(own for _, own in acting))
        if rows is None:
            return _bare(entry)
        places = [place for place, own in acting if own in rows.owners]
        chosen = [starts[place] + i for place in places for i in range(ranks[place])]
        inner = entry.core_gram[chosen][:, chosen]
        if only is not None and "core_gram" in only:
            return replace(_bare(entry), core_gram=inner, core_rows=rows.stacked)
        return replace(_bare(entry), gram_factor=core_root(inner) @ rows.inverse)

    def read_bytes(self, name: str, only: Collection[str]) -> int:
        """Return how many bytes `read` takes from the file."""
        return self._file.read_bytes(name, ("core_gram",)) if "gram" in only else 0


def as_merged(statistics: Statistics, rows: AdapterRows, owner: str) -> Statistics:
    """Return statistics as a merge of these experts reads them.

    Raises:
        StatisticsError: they were collected for other adapters.
    """
    if isinstance(statistics, StatisticsFile) and statistics.provenance["settings"].get("core"):
        return CoreStatistics(statistics, rows, owner)
    return statistics


def _bare(entry: LayerStatistics) -> LayerStatistics:
    """Return the counts of an entry."""
    return LayerStatistics(
        count=entry.count, sample_count=entry.sample_count, examples=entry.examples
    )
