"""The parts of files that a report reads; whatever else stands in them is left alone.

Files come from elsewhere: every value has a type and bounds, and a wrong one is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

_Text = Annotated[str, Field(max_length=20_000)]
_Count = Annotated[int, Field(ge=0)]


class _View(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class PointView(_View):
    """One α of a curve, or one value of the parameter that was searched over."""

    at: float = Field(validation_alias=AliasChoices("scale", "parameter"))
    value: float | None
    parts: dict[str, float | None] = Field(default_factory=dict)


class CurveView(_View):
    """A search for α, or for `over`, as `tune --json`, `--plot` and `eutectic.json` have it."""

    search: _Text = ""
    objective: _Text
    maximise: bool = False
    scale: float
    over: _Text | None = None
    value: float | None = None
    points: Annotated[list[PointView], Field(min_length=1, max_length=10_000)]
    method: _Text = ""

    @property
    def chosen(self) -> float:
        """The best α, or value of the parameter."""
        return self.scale if self.over is None or self.value is None else self.value


class ClosedFormView(_View):
    """A search that tried nothing: α in closed form, or by a norm."""

    search: _Text
    scale: float


class ParentView(_View):
    """A parent of a merge."""

    name: _Text
    licence: _Text = "unknown"
    fingerprint: _Text = ""
    statistics: dict[str, Any] | None = None


class MergedTensorView(_View):
    """One tensor of a merge."""

    treatment: _Text
    method: _Text
    post: _Text | None = None
    scale: float | None = None
    reason: _Text = ""
    sha256: _Text = ""


class ProvenanceView(_View):
    """The `eutectic.json` of a merged folder."""

    eutectic: _Text
    torch: _Text = ""
    recipe: dict[str, Any] = Field(default_factory=dict)
    method: _Text | None = None
    scale: float | None = None
    treatments: dict[str, int] = Field(default_factory=dict)
    merged_by: dict[str, int] = Field(default_factory=dict)
    mostly_by: _Text = ""
    fallback: dict[str, Any] = Field(default_factory=dict)
    norms: dict[str, Any] = Field(default_factory=dict)
    shares: dict[str, Any] = Field(default_factory=dict)
    notes: list[_Text] = Field(default_factory=list)
    parents: dict[str, ParentView] = Field(default_factory=dict[str, ParentView])
    tensors: dict[str, MergedTensorView]
    records: dict[str, Any] = Field(default_factory=dict)
    search: CurveView | ClosedFormView | None = None
    calibration: dict[str, Any] | None = None


class PlannedTensorView(_View):
    """One tensor of a plan."""

    name: _Text
    shape: list[_Count] = Field(default_factory=list[int])
    treatment: _Text
    method: _Text
    post: _Text | None = None
    scale: float | None = None
    why: _Text = ""


class PlanView(_View):
    """What `eutectic plan --json` prints."""

    method: _Text
    scale: float | None
    cost: dict[str, float]
    merged_by: dict[str, int]
    shares: dict[str, Any] = Field(default_factory=dict)
    notes: list[_Text] = Field(default_factory=list)
    tensors: list[PlannedTensorView]
    threads: int = 1


class CandidateView(_View):
    """A row of a comparison."""

    name: _Text
    method: _Text | None = None
    search: _Text | None = None
    scale: float | None = None
    error: _Text | None = None


class ComparisonView(_View):
    """The `comparison.json` of a comparison's folder."""

    best: _Text
    rows: list[CandidateView]
    notes: list[_Text] = Field(default_factory=list)
    left_out: dict[str, _Text] = Field(default_factory=dict)


class QualityView(_View):
    """How well a routed model's routers decide, as `routed.json` keeps it."""

    measured: bool = False
    chance: float | None = None
    samples: dict[str, _Count] = Field(default_factory=dict)
    decisions: dict[str, float] = Field(default_factory=dict)
    layers: dict[str, dict[str, float]] = Field(default_factory=dict)
    confusion: dict[str, dict[str, float]] = Field(default_factory=dict)


class RoutedLayerView(_View):
    """One routed layer."""

    name: _Text


class RoutedView(_View):
    """The `routed.json` of a routed folder."""

    experts: list[_Text]
    router: _Text
    layers: list[RoutedLayerView]
    quality: QualityView | None = None
