"""The results of an evaluation: the published schema of results.json."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from eutectic.tables import InNotebooks, Shown, data_frame, facts, interval, number, table

Interval = Annotated[
    tuple[float, float] | None, Field(description="Percentiles 2.5 and 97.5 of the bootstrap.")
]
SCHEMA_ID = "urn:eutectic:results:1"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckpointRecord(_Record):
    """One checkpoint that was evaluated."""

    name: str
    role: Literal["base", "expert", "model"]
    path: str
    fingerprint: str = Field(description="Identity of the weights; see `checkpoint.content`.")
    routing: Literal["route", "oracle", "base"] | None = Field(
        description="How the experts of a routed model were chosen; null for other models."
    )


class TaskRecord(_Record):
    """One task that was evaluated."""

    name: str
    kind: str
    expert: str = Field(description="The expert that figures are normalised by.")
    metric: str
    higher_is_better: bool
    split: Literal["proxy", "validation", "test"]
    n: int = Field(description="Rows scored.")
    data_hash: str = Field(description="SHA-256 over the rows' inputs and answers, in order.")
    splits: dict[str, int] = Field(description="Different rows per split; they are disjoint.")
    head_hashes: dict[Literal["head", "base_head"], str] = Field(
        description="SHA-256 of the head files that the task names, if any."
    )


class Figures(_Record):
    """A metric with what is derived from it; null where undefined or a reference is missing."""

    value: float | None
    interval: Interval
    standard_error: float | None = Field(description="Of the value, by the bootstrap.")
    normalized: float | None = Field(
        description="value / expert's value; expert's value / value where lower is better."
    )
    normalized_interval: Interval
    nai: float | None = Field(description="(value - base) / (expert - base).")
    nai_interval: Interval


class Result(Figures):
    """One checkpoint on one task."""

    checkpoint: str
    task: str
    n: int


class Mean(Figures):
    """One checkpoint over its tasks; the experts together, each on its own tasks, are `experts`."""

    checkpoint: str
    tasks: tuple[str, ...]


class Difference(_Record):
    """Mean of one checkpoint less that of another, paired: both on the same resamples of rows."""

    checkpoint: str
    other: str
    value: float | None
    interval: Interval
    standard_error: float | None = Field(None, description="Of the value, by the bootstrap.")
    normalized: float | None = Field(description="Of the normalised values.")
    normalized_interval: Interval
    normalized_standard_error: float | None = Field(None, description="Of the normalised values.")


class Results(InNotebooks, _Record):
    """A whole evaluation."""

    schema_version: Literal[1] = 1
    split: Literal["proxy", "validation", "test"]
    limit: int | None = Field(description="Only so many rows of each split were scored.")
    dtype: Literal["float32", "bfloat16"]
    seed: int = Field(description="Of the bootstrap; all checkpoints share its resamples.")
    resamples: int
    versions: dict[str, str]
    checkpoints: tuple[CheckpointRecord, ...]
    tasks: tuple[TaskRecord, ...]
    results: tuple[Result, ...]
    means: tuple[Mean, ...]
    differences: tuple[Difference, ...] = Field(
        (), description="Every ordered pair of the base and the models."
    )
    notes: tuple[str, ...] = Field((), description="What a reader of the figures should know.")

    def to_pandas(self) -> Any:
        """Return a data frame, one row per checkpoint and task, with intervals in two columns."""
        return data_frame(map(_flat, self.results))

    def __repr__(self) -> str:
        """Show checkpoints as rows and tasks as columns, then the means."""
        return "\n\n".join(self._parts())

    def _parts(self) -> Sequence[Shown]:
        """Return the same for notebooks too."""
        experts = {c.name for c in self.checkpoints if c.role == "expert"}
        cells = {
            ("experts" if r.checkpoint in experts else r.checkpoint, r.task): r.value
            for r in self.results
        }
        names = [mean.checkpoint for mean in self.means]
        tasks = [t.name for t in self.tasks]
        below = {t.metric: "" if t.higher_is_better else " (lower is better)" for t in self.tasks}
        rows = [[name, *(number(cells.get((name, task))) for task in tasks)] for name in names]
        means = [
            [m.checkpoint, interval(m.value, m.interval), number(m.normalized, 3)]
            + [interval(m.nai, m.nai_interval)]
            for m in self.means
        ]
        known = {
            "metric": ", ".join(metric + text for metric, text in below.items()),
            "split": self.split,
            "notes": "\n".join(self.notes),
        }
        headers = ["", "mean [95 %]", "of the expert", "NAI [95 %] (0: base, 1: expert)"]
        return facts("Results", known), table(["", *tasks], rows), table(headers, means)

    __str__ = __repr__


def _flat(result: Result) -> dict[str, Any]:
    """Return a row of a data frame, with both ends of every interval in columns of their own."""
    row: dict[str, Any] = {"checkpoint": result.checkpoint, "task": result.task}
    for key, value in result.model_dump().items():
        if key.endswith("interval"):
            row[f"{key}_low"], row[f"{key}_high"] = value or (None, None)
        else:
            row[key] = value
    return row


def results_schema() -> dict[str, Any]:
    """Return the JSON schema of results.json, as published in docs/schemas."""
    schema = Results.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **schema}
