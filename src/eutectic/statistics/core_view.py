"""Statistics that were collected for adapters, as a merge of these adapters reads them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.expert_tensors import Expert
from eutectic.errors import StatisticsError
from eutectic.linalg import lapack
from eutectic.statistics.statistics_file import StatisticsFile
from eutectic.types import LayerStatistics, Statistics
from eutectic.words import few

_DEPENDENT = 1e-12  # of the largest eigenvalue of the rows' products: rows that are others' sums


class CoreStatistics:
    """Statistics for adapters as a merge of these adapters reads them: input Grams of few rows.

    Of a Gram C they show P·C·P, with P the projector onto the rows of the adapters that are merged:
    as `gram_factor`, whose rows lie in their span. Nothing else of C can reach a core of them.
    """

    def __init__(self, file: StatisticsFile, experts: Mapping[str, Expert], owner: str) -> None:
        self._file = file
        stated: Mapping[str, Any] = file.provenance["settings"]["core"]
        self._ranks: Mapping[str, Sequence[int]] = stated["ranks"]
        self._base_names: Mapping[str, str] = stated["base_names"]
        known = {entry["fingerprint"]: i for i, entry in enumerate(stated["adapters"])}
        self._experts: dict[int, Expert] = {}
        others: list[str] = []
        for name, expert in experts.items():
            place = known.get(expert.fingerprint()) if expert.is_delta else None
            if place is None:
                others.append(name)
            else:
                self._experts[place] = expert
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

        It comes in rows either way.
        """
        del in_rows
        if only is not None and "gram" not in only:
            return _bare(self._file.read(name, ()))
        entry = self._file.read(name, ("core_gram",))
        if entry.core_gram is None:
            return _bare(entry)
        ranks = self._ranks[name]
        starts = [sum(ranks[:i]) for i in range(len(ranks))]
        chosen: list[int] = []
        rows: list[Tensor] = []
        for place, expert in sorted(self._experts.items()):
            own = expert.input_rows(self._base_names[name]) if ranks[place] else None
            if own is not None:
                rows.append(own.double())
                chosen += range(starts[place], starts[place] + ranks[place])
        if not rows:
            return _bare(entry)
        inner = entry.core_gram.double()[chosen][:, chosen]
        return replace(_bare(entry), gram_factor=_projected_root(inner, torch.cat(rows)))

    def read_bytes(self, name: str, only: Collection[str]) -> int:
        """Return how many bytes `read` takes from the file."""
        return self._file.read_bytes(name, ("core_gram",)) if "gram" in only else 0


def as_merged(statistics: Statistics, experts: Mapping[str, Expert], owner: str) -> Statistics:
    """Return statistics as a merge of these experts reads them.

    Raises:
        StatisticsError: they were collected for other adapters.
    """
    if isinstance(statistics, StatisticsFile) and statistics.provenance["settings"].get("core"):
        return CoreStatistics(statistics, experts, owner)
    return statistics


def _bare(entry: LayerStatistics) -> LayerStatistics:
    """Return the counts of an entry."""
    return LayerStatistics(
        count=entry.count, sample_count=entry.sample_count, examples=entry.examples
    )


def _projected_root(inner: Tensor, rows: Tensor) -> Tensor:
    """Return F `[k, in]` with FᵀF = P·C·P, from A·C·Aᵀ and the rows A `[R, in]`, in float64.

    F = G^{1/2}(AAᵀ)⁺A. Rows that depend on each other to rounding count once.
    """
    values, vectors = lapack.eigh(rows @ rows.mT)
    kept = values > values[0] * len(values) * _DEPENDENT
    inverse = (vectors[:, kept] / values[kept]) @ (vectors[:, kept].mT @ rows)
    energies, directions = lapack.eigh((inner + inner.mT) / 2)
    positive = energies > 0
    return (directions[:, positive] * energies[positive].sqrt()).mT @ inverse
