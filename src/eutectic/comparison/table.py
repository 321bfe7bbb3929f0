"""The table of a comparison: rows by rank, what is best, and what cannot be told from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eutectic.evaluation.results import Difference, Mean, Results
from eutectic.storage import view
from eutectic.tables import InNotebooks, Shown, data_frame, facts, interval, number, table

Interval = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """A number with its bootstrap: interval of 95 % and standard error; None where undefined."""

    value: float | None
    interval: Interval | None = None
    standard_error: float | None = None


@dataclass(frozen=True)
class Row:
    """One merge: a method at one α, or a model that was there before.

    Attributes:
        name: of the row, `METHOD@SEARCH`; of other models their own.
        method: None for other models.
        parameters: that were stated for the method.
        search: how α was chosen: `default`, a number, `auto`, `divergence`, `validation`.
        scale: α.
        mean: over tasks, of the metric; None where metrics do not go together.
        of_experts: mean over tasks of the share of the expert's figure (1: as good as the experts).
        nai: mean over tasks of (m − m_base) / (m_expert − m_base).
        behind: what it lacks to the best row, paired: the difference to that row, on the same
            resamples, of `of_experts` or, where there is none, of `mean`. 0 for the best itself.
        distinguishable: whether the interval of `behind` leaves out 0.
        tasks: task -> metric.
        norms: how large the merged change is; see `MergeReport.norms`.
        warnings: of the merge.
        error: why it has no figures: merging or running it failed.
    """

    name: str
    method: str | None
    parameters: Mapping[str, Any]
    search: str | None
    scale: float | None
    mean: Figure
    of_experts: Figure
    nai: Figure
    behind: Figure
    distinguishable: bool
    tasks: Mapping[str, float | None]
    norms: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False)
    warnings: tuple[str, ...] = field(default=(), repr=False)
    error: str | None = None


@dataclass(frozen=True)
class Comparison(InNotebooks):
    """A finished comparison.

    Attributes:
        rows: the best first; those that failed last.
        best: the name of the best row; "" if all failed.
        level: names of the rows whose paired difference to the best is not distinguishable from 0.
        left_out: usual methods that these inputs do not allow -> why.
        references: `base` and `experts`: their means.
        results: of `eutectic.evaluate` over base, experts and all rows.
        output: the folder; None where nothing was kept.
        notes: what a reader should know.
    """

    rows: tuple[Row, ...]
    best: str
    level: tuple[str, ...]
    left_out: Mapping[str, str]
    references: Mapping[str, Figure]
    results: Results = field(repr=False)
    output: Path | None = None
    notes: tuple[str, ...] = ()

    def to_pandas(self) -> Any:
        """Return the rows as a data frame, the best first, with a column per task."""
        return data_frame(
            (
                {
                    "row": row.name,
                    "method": row.method,
                    "search": row.search,
                    "scale": row.scale,
                    "mean": row.mean.value,
                    "of_experts": row.of_experts.value,
                    "nai": row.nai.value,
                    "behind": row.behind.value,
                    "distinguishable": row.distinguishable,
                    **row.tasks,
                    "error": row.error,
                }
                for row in self.rows
            ),
            "row",
        )

    def __repr__(self) -> str:
        """Show the rows, the best first, and what cannot be told from it."""
        return "\n\n".join(self._parts())

    def _parts(self) -> Sequence[Shown]:
        """Return the same for notebooks too."""
        rows = [
            [row.name, number(row.scale, 3), interval(row.mean.value, row.mean.interval)]
            + [number(row.of_experts.value, 3), interval(row.behind.value, row.behind.interval)]
            for row in self.rows
        ]
        known = {
            "best": self.best,
            "not distinguishable from it": ", ".join(self.level),
            "left out": ", ".join(self.left_out),
            "notes": "\n".join(self.notes),
        }
        headers = ["row", "α", "mean [95 %]", "of experts", "behind the best [95 %]"]
        return facts("Comparison", known), table(headers, rows)

    def recipe(self, name: str | None = None) -> Path | None:
        """Return the recipe of a row (default: of the best), None where it has none."""
        if self.output is None:
            return None
        view(self.output)
        path = self.output / "recipes" / f"{file_name(name or self.best)}.yaml"
        return path if path.is_file() else None

    def as_record(self) -> dict[str, Any]:
        """Return `comparison.json`, JSON-serialisable."""
        from dataclasses import asdict

        return {
            "schema_version": 1,
            "best": self.best,
            "level": list(self.level),
            "split": self.results.split,
            "rows": [asdict(row) for row in self.rows],
            "references": {name: asdict(figure) for name, figure in self.references.items()},
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Made:
    """What is known of a row besides its figures."""

    name: str
    method: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])
    search: str | None = None
    scale: float | None = None
    norms: Mapping[str, Any] = field(default_factory=dict[str, Any])
    warnings: tuple[str, ...] = ()
    error: str | None = None


def ranked(results: Results, made: Sequence[Made]) -> tuple[list[Row], str]:
    """Return the rows, the best first, and the name of the best.

    By the share of the experts' figures where all rows have one, else by the mean of the metric.
    Of rows that are equal the one that was named first comes first.
    """
    means = {mean.checkpoint: mean for mean in results.means}
    measured = [m for m in made if m.error is None and m.name in means]
    shares = all(means[m.name].normalized is not None for m in measured)
    higher = all(task.higher_is_better for task in results.tasks)
    sign = 1 if shares or higher else -1

    def rank(item: Made) -> float:
        found = means[item.name].normalized if shares else means[item.name].value
        return float("inf") if found is None else -sign * found

    order = sorted(measured, key=rank)
    best = order[0].name if order else ""
    paired = {d.checkpoint: d for d in results.differences if d.other == best}
    rows = [_row(m, means[m.name], paired.get(m.name), shares, results) for m in order]
    none = Figure(None)
    failed = [m for m in made if m not in measured]
    rows += [
        Row(
            **_stated(m), mean=none, of_experts=none, nai=none, behind=none, distinguishable=True,
            tasks={}, error=m.error or "it has no figures",
        )
        for m in failed
    ]  # fmt: skip
    return rows, best


def _stated(made: Made) -> dict[str, Any]:
    keys = ("name", "method", "parameters", "search", "scale", "norms", "warnings")
    return {key: getattr(made, key) for key in keys}


def _row(
    made: Made, mean: Mean, difference: Difference | None, shares: bool, results: Results
) -> Row:
    behind, distinguishable = Figure(0.0, (0.0, 0.0), 0.0), False
    if difference is not None:
        behind = Figure(difference.value, difference.interval, difference.standard_error)
        if shares:
            error = difference.normalized_standard_error
            behind = Figure(difference.normalized, difference.normalized_interval, error)
        low, high = behind.interval or (0.0, 0.0)
        # Of models that answer alike the interval is a point.
        distinguishable = low > 0 or high < 0
    own = [r for r in results.results if r.checkpoint == made.name]
    return Row(
        **_stated(made),
        mean=Figure(mean.value, mean.interval, mean.standard_error),
        of_experts=Figure(mean.normalized, mean.normalized_interval),
        nai=Figure(mean.nai, mean.nai_interval),
        behind=behind,
        distinguishable=distinguishable,
        tasks={r.task: r.value for r in own},
    )


def references_of(results: Results) -> dict[str, Figure]:
    """Return the means of the base and of the experts, on their own tasks."""
    return {
        mean.checkpoint: Figure(mean.value, mean.interval, mean.standard_error)
        for mean in results.means
        if mean.checkpoint in ("base", "experts")
    }


def file_name(name: str) -> str:
    """Return a row's name as the name of a file; different names have different ones.

    >>> file_name("ties:density=0.3@default")
    'ties_density=0.3@default'
    """
    allowed = "".join(c if c.isalnum() or c in "._=@+-" else "_" for c in name)
    if allowed == name.replace(":", "_") and len(allowed) <= 120:
        return allowed
    import hashlib

    return f"{allowed[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
