"""What an inspection says: the schema of `inspection.json`.

Values that are not defined (the cosine with a zero matrix) are null. Pair tables `[T][T]` are in
the order of `experts`.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from eutectic.tables import InNotebooks, Shown, data_frame, facts, number, table

Share = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Pairs = list[list[float | None]]
SCHEMA_ID = "https://eutectic.readthedocs.io/schemas/inspection-1.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Spectrum(_Strict):
    """The singular values of one delta."""

    norm: Size = Field(description="‖Δ‖_F.")
    relative_norm: Size | None = Field(description="‖Δ‖_F / ‖W₀‖_F.")
    stable_rank: Size | None = Field(description="Σσ²/σ₁².")
    effective_rank: Size | None = Field(description="exp of the entropy of σ/Σσ.")
    energy: Share | None = Field(description="share of Σσ² in the layer's `leading` triplets.")
    rank: Count = Field(description="number of singular values above rounding.")
    positions: list[int] = Field(
        description="1-based positions of `values` in the descending spectrum, thinned."
    )
    values: list[Size] = Field(description="singular values at `positions`.")


class Alignment(_Strict):
    """Subspace alignment with one merged model."""

    rank: Count = Field(
        description="q, directions of Δ_M that leave no more than the relative error."
    )
    ratio: dict[str, Share | None] = Field(description="expert -> SAR.")


class Interference(_Strict):
    """Pairs of experts; row s, column t."""

    cosine: Pairs = Field(description="⟨Δ_s, Δ_t⟩/(‖Δ_s‖‖Δ_t‖).")
    overlap_left: Pairs = Field(description="‖U_sᵀU_t‖_F²/k of the leading left vectors (outputs).")
    overlap_right: Pairs = Field(description="the same of the right vectors (inputs).")
    sign_conflicts: Pairs = Field(description="share of entries with opposite signs.")
    singular: Pairs = Field(description="singular task interference of the pair over Σσ of both.")
    activation: Pairs | None = Field(
        default=None,
        description="tr(Δ_s A_t Δ_sᵀ)/tr(Δ_t A_t Δ_tᵀ): how much s moves outputs on t's data, in "
        "units of what t itself does. Null where t has no statistics; None without any.",
    )


class Layer(_Strict):
    """One matrix."""

    name: str = Field(description="the tensor, with `[block][part]` for stacks and fused matrices.")
    shape: tuple[int, int] = Field(description="[out, in].")
    leading: Count = Field(
        description="k, the triplets of each expert that overlaps and energies are about."
    )
    base_norm: Size = Field(description="‖W₀‖_F.")
    experts: dict[str, Spectrum] = Field(description="expert -> spectrum of Δ_t.")
    sum: Spectrum = Field(description="spectrum of ΣΔ_t.")
    merged: dict[str, Spectrum] = Field(description="merged model -> spectrum of Δ_M.")
    alignment: dict[str, Alignment] = Field(description="merged model -> SAR.")
    singular_task_interference: Size = Field(
        description="‖(UᵀU − I) Σ (VᵀV − I)‖₁ over all experts."
    )
    interference: Interference = Field(description="pairs of experts.")


class TaskSummary(_Strict):
    """One expert over all layers."""

    norm: Size = Field(description="of the whole task vector's matrices, √Σ‖Δ_t‖².")
    relative_norm: Size | None = Field(description="that over √Σ‖W₀‖².")
    stable_rank: Size | None = Field(description="mean over layers.")
    effective_rank: Size | None = Field(description="mean over layers.")
    most_interfering: str | None = Field(
        description="the expert that interferes most with this one."
    )
    interference: Size | None = Field(
        description="by how much: by `activation` with statistics, else by `singular`."
    )
    by: Literal["activation", "singular"] = Field(description="which of the two.")


class MergedSummary(_Strict):
    """One merged model over all layers."""

    sar: Share | None = Field(description="mean of the tasks' means.")
    task_sar: dict[str, Share | None] = Field(description="expert -> mean SAR over layers.")
    nai: dict[str, float | None] = Field(
        description="expert -> normalised accuracy improvement, as far as results tell."
    )
    mean_nai: float | None = Field(description="mean over the experts that have one.")
    growth: Size | None = Field(
        default=None,
        description="‖Δ_M‖ over all layers, over the mean of the experts' norms; above 3 it has "
        "most likely exploded.",
    )
    rank: Size = Field(description="mean of q over layers.")
    effective_rank: Size | None = Field(description="mean over layers.")


class CorrelationValue(_Strict):
    """A correlation; null for fewer than three points or a constant side."""

    pearson: float | None
    spearman: float | None
    count: Count


class SarNai(_Strict):
    """SAR against NAI: over all points, over each model's tasks, over the models' means."""

    overall: CorrelationValue
    within: dict[str, CorrelationValue]
    means: CorrelationValue


class Summary(_Strict):
    """The whole model."""

    tasks: dict[str, TaskSummary] = Field(description="per expert.")
    merged: dict[str, MergedSummary] = Field(description="per merged model.")
    interference: Interference = Field(
        description="pairs over all layers: the cosine of whole task vectors, "
        "means over layers, and the median for `activation`."
    )
    correlation: SarNai | None = Field(default=None, description="SAR against NAI, of results.")


class Inspection(InNotebooks, _Strict):
    """Everything that was measured."""

    schema_version: Literal[1] = Field(default=1, description="of this file's form.")
    eutectic: str = Field(description="version of the package.")
    base: str = Field(description="path of the base, as it was named.")
    experts: dict[str, str] = Field(description="name -> path.")
    merged: dict[str, str] = Field(description="name -> path.")
    error: float = Field(description="relative error in the definition of q.")
    pattern: str | None = Field(description="of layers, if one was given.")
    notes: list[str] = Field(description="what a reader should know.")
    summary: Summary = Field(description="the whole model.")
    layers: list[Layer] = Field(description="one entry per matrix.")

    def to_pandas(self) -> Any:
        """Return a data frame, one row per matrix and expert or merged model."""
        return data_frame(
            {
                "layer": layer.name,
                "model": name,
                "role": role,
                "out": layer.shape[0],
                "in": layer.shape[1],
                **{key: value for key, value in own.model_dump().items() if _is_number(value)},
            }
            for layer in self.layers
            for role, spectra in (("expert", layer.experts), ("merged", layer.merged))
            for name, own in spectra.items()
        )

    def __repr__(self) -> str:
        """Show the experts and the merged models over all layers."""
        return "\n\n".join(self._parts())

    def _parts(self) -> Sequence[Shown]:
        """Return the same for notebooks too."""
        tasks, merged = self.summary.tasks, self.summary.merged
        rows = [
            [name, number(t.norm), number(t.relative_norm, 3), number(t.stable_rank, 3)]
            + [t.most_interfering or "–", number(t.interference, 3)]
            for name, t in tasks.items()
        ]
        headers = ["expert", "‖Δ‖", "‖Δ‖/‖W₀‖", "stable rank", "interferes most", "by"]
        known = {"matrices": len(self.layers), "notes": "\n".join(self.notes)}
        parts = [facts("Inspection", known), table(headers, rows)]
        if merged:
            lines = [
                [name, number(m.sar, 3), number(m.growth, 3), number(m.mean_nai, 3)]
                for name, m in merged.items()
            ]
            parts.append(table(["merged", "SAR", "‖Δ‖ / experts'", "NAI"], lines))
        return parts

    __str__ = __repr__


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def schema_text() -> str:
    """Return the JSON schema of inspection.json, as published in docs/schemas."""
    schema = Inspection.model_json_schema(mode="serialization")
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID}
    return json.dumps({**head, **schema}, indent=1, ensure_ascii=False) + "\n"
