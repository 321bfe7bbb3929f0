"""What a report says: the schema of `report.json`, from which every format is made.

A part is null, or an empty list, where no source has its data. Values that are not defined are
null.
"""

from __future__ import annotations

import html
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_ID = "urn:eutectic:report:1"
Interval = Annotated[
    tuple[float, float] | None, Field(description="of 95 %, by the bootstrap over test rows.")
]
Role = Literal["base", "expert", "experts", "model"]
Level = Literal["headline", "good", "bad", "info", "next"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Source(_Strict):
    """One thing that the report was made of."""

    name: str
    kind: str = Field(description="merged model, plan, results, …")
    path: str = Field(description="as it was named; of an absolute path the last part.")


class Finding(_Strict):
    """One sentence of the verdict."""

    kind: str = Field(description="stable name of what is said.")
    level: Level
    text: str = Field(description="the sentence.")
    subject: tuple[str, ...] = Field(default=(), description="names it is about.")
    numbers: dict[str, Any] = Field(default_factory=dict, description="what the sentence counts.")
    command: str = Field(default="", description="what to type, where something is to be tried.")


class Figure(_Strict):
    """A number with its interval; both null where undefined."""

    value: float | None = None
    interval: Interval = None


class ModelScore(_Strict):
    """One checkpoint over its tasks."""

    name: str
    role: Role
    mean: Figure = Field(description="of the metric over tasks.")
    share: Figure = Field(description="mean of the tasks' shares of the expert's figure.")
    nai: Figure = Field(description="mean of (value − base) / (expert − base).")
    behind: Figure = Field(
        default=Figure(),
        description="share (or mean) less that of the best model.",
    )
    paired: bool = Field(
        default=True, description="`behind` is of the same resamples, so that common luck cancels."
    )
    level: bool = Field(default=False, description="not distinguishable from the best model.")
    note: str = Field(default="", description="method and α, where the source says them.")


class TaskInfo(_Strict):
    """One task."""

    name: str
    expert: str
    metric: str
    higher_is_better: bool
    rows: int = Field(description="test rows that were scored.")
    data_hash: str = Field(description="SHA-256 of these rows.")


class Score(_Strict):
    """One checkpoint on one task."""

    model: str
    task: str
    value: Figure
    share: Figure = Field(description="of the expert's figure.")


class Scores(_Strict):
    """How good the models of one results file are."""

    name: str = Field(description="of the source.")
    split: str
    tasks: list[TaskInfo]
    models: list[ModelScore] = Field(description="the base, the experts together, then the rest.")
    scores: list[Score]
    best: str | None = Field(description="the model that ranks first.")
    resamples: int = Field(description="of the bootstrap; 0: intervals come from elsewhere.")
    by: Literal["share", "mean"] = Field(description="what models are ranked by.")
    notes: list[str]


class CurvePoint(_Strict):
    """One α that was tried."""

    scale: float
    value: float | None
    parts: dict[str, float | None] = Field(description="task -> its part, in its own unit.")


class Curve(_Strict):
    """A search for α, or for a parameter."""

    name: str
    symbol: str = Field("α", description="what was searched: α, or a parameter's name.")
    search: str
    objective: str
    maximise: bool
    chosen: float
    at_edge: bool = Field(description="the chosen α is the smallest or the largest that was tried.")
    points: list[CurvePoint] = Field(description="in ascending order of α.")


class Measure(_Strict):
    """One number per layer and kind of matrix."""

    key: str
    label: str
    unit: str
    meaning: str
    scale: Literal["sequential", "diverging", "state"]
    low: float
    high: float
    values: list[list[float | None]] = Field(description="rows × columns of the map.")
    states: list[str] = Field(default_factory=list, description="names of the values, if states.")


class LayerMap(_Strict):
    """Measures over the model: layers in their order down, kinds of matrices across."""

    name: str = Field(description="which source it is of.")
    rows: list[str]
    columns: list[str]
    measures: list[Measure]
    notes: list[str] = Field(default_factory=list)


class Line(_Strict):
    """One spectrum."""

    name: str
    role: Literal["expert", "sum", "merged"]
    positions: list[int] = Field(description="1-based, in the descending spectrum.")
    values: list[float]


class Spectra(_Strict):
    """Singular values of one layer's changes."""

    layer: str
    lines: list[Line]


class PairTable(_Strict):
    """A number per pair of experts, row over column."""

    key: str
    label: str
    meaning: str
    scale: Literal["sequential", "diverging"]
    low: float
    high: float
    names: list[str]
    values: list[list[float | None]]


class Residuals(_Strict):
    """How a linear system of one tensor was solved."""

    model: str
    tensor: str
    status: str
    residuals: list[float | None] = Field(description="relative, one per step from the start.")


class Depth(_Strict):
    """Shares of each task's samples that one block of the network sends to the right expert."""

    block: str
    shares: dict[str, float]


class Routing(_Strict):
    """A routed model."""

    name: str
    experts: list[str]
    router: str
    layers: int
    rank: int | None = None
    measured: bool | None = Field(default=None, description="by decisions on data; else estimated.")
    chance: float | None = None
    samples: dict[str, int] = Field(default_factory=dict)
    decisions: dict[str, float] = Field(
        default_factory=dict, description="task -> share of samples sent to its own expert."
    )
    confusion: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="task -> expert -> share, where it was measured."
    )
    depth: list[Depth] = Field(default_factory=list[Depth])


class TensorRow(_Strict):
    """What became of one tensor."""

    model: str
    name: str
    shape: list[int] | None = None
    treatment: str
    method: str
    scale: float | None
    reason: str
    sha256: str = ""


class Parent(_Strict):
    """A model that went into a merge."""

    role: str
    path: str
    licence: str
    fingerprint: str
    data: dict[str, str] = Field(default_factory=dict, description="of its statistics.")


class Merge(_Strict):
    """Where a merged model comes from."""

    name: str
    method: str
    mostly_by: str
    scale: float | None
    planned: bool = Field(description="a plan, which nobody has carried out yet.")
    recipe: str = Field(default="", description="YAML, to copy.")
    versions: dict[str, str] = Field(default_factory=dict)
    parents: list[Parent] = Field(default_factory=list[Parent])
    treatments: dict[str, int] = Field(default_factory=dict)
    merged_by: dict[str, int] = Field(default_factory=dict)
    growth: float | None = Field(default=None, description="‖αΔ‖ over the mean of the experts'.")
    bound: float | None = Field(default=None, description="above it, α is most likely too large.")
    shares: dict[str, float] = Field(
        default_factory=dict, description="of the experts' numbers: merged, kept, left."
    )
    fallback: float | None = Field(default=None, description="share that fell back.")
    calibrated: dict[str, int] = Field(default_factory=dict, description="kind of layer -> count.")
    notes: list[str] = Field(default_factory=list)


class DataRow(_Strict):
    """Data that something was measured on or collected from."""

    name: str
    use: str
    examples: int | None
    fingerprint: str


class GramRow(_Strict):
    """How the Gram of a layer's inputs is kept in a statistics file."""

    of: str = Field(description="name of the statistics.")
    layers: list[str] = Field(description="that share it.")
    width: int = Field(description="inputs.")
    tokens: int
    kept: str = Field(description="whole, or in how many directions or rows.")
    beside: float | None = Field(
        description="share of its trace that the directions leave to a diagonal: their error in "
        "nuclear norm."
    )
    nbytes: int


class Cost(_Strict):
    """One cost."""

    name: str
    what: str
    value: float
    unit: Literal["bytes", "s"]


class Report(_Strict):
    """Everything that the page shows."""

    schema_version: Literal[1] = Field(default=1, description="of this file's form.")
    eutectic: str = Field(description="version of the package.")
    title: str
    sources: list[Source]
    verdict: list[Finding]
    scores: list[Scores] = Field(default_factory=list[Scores])
    curves: list[Curve] = Field(default_factory=list[Curve])
    maps: list[LayerMap] = Field(default_factory=list[LayerMap])
    spectra: list[Spectra] = Field(default_factory=list[Spectra])
    pairs: list[PairTable] = Field(default_factory=list[PairTable])
    residuals: list[Residuals] = Field(default_factory=list[Residuals])
    routing: list[Routing] = Field(default_factory=list[Routing])
    tensors: list[TensorRow] = Field(default_factory=list[TensorRow])
    merges: list[Merge] = Field(default_factory=list[Merge])
    data: list[DataRow] = Field(default_factory=list[DataRow])
    grams: list[GramRow] = Field(default_factory=list[GramRow])
    costs: list[Cost] = Field(default_factory=list[Cost])

    def json_text(self) -> str:
        """Return the report as JSON, in the form that docs/schemas/report-1.json describes."""
        return self.model_dump_json(indent=1) + "\n"

    def html(self) -> str:
        """Return the report as one HTML page that needs nothing else.

        Raises:
            MissingExtraError: jinja2 is not installed.
        """
        from eutectic.reporting.page.html_page import html_page

        return html_page(self)

    def markdown(self) -> str:
        """Return the report as Markdown: the tables, without the pictures."""
        from eutectic.reporting.page.markdown_page import markdown_page

        return markdown_page(self)

    def _repr_html_(self) -> str:
        """Show the page in a notebook, in a frame of its own."""
        page = html.escape(self.html(), quote=True)
        size = 'style="width:100%;height:80vh;border:1px solid #888"'
        sandbox = 'sandbox="allow-scripts allow-popups"'
        return f'<iframe title="eutectic report" {sandbox} {size} srcdoc="{page}"></iframe>'

    def __repr__(self) -> str:
        """Show the verdict."""
        return "\n".join([self.title, *(f"  {finding.text}" for finding in self.verdict)])

    __str__ = __repr__


def schema_text() -> str:
    """Return the JSON schema of a report, as published in docs/schemas."""
    schema = Report.model_json_schema(mode="serialization")
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID}
    return json.dumps({**head, **schema}, indent=1, ensure_ascii=False) + "\n"
