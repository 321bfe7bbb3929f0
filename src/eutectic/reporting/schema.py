"""What an inspection says: the schema of `inspection.json`.

Values that are not defined (the cosine with a zero matrix) are null. Pair tables `[T][T]` are in
the order of `experts`.
"""

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Pairs = list[list[float | None]]
SCHEMA_ID = "https://eutectic.readthedocs.io/schemas/inspection-1.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Spectrum(_Strict):
    """The singular values of one delta.

    Attributes:
        norm: ‖Δ‖_F.
        relative_norm: ‖Δ‖_F / ‖W₀‖_F.
        stable_rank: Σσ²/σ₁².
        effective_rank: exp of the entropy of σ/Σσ.
        energy: share of Σσ² in the layer's `leading` triplets.
        rank: number of singular values above rounding.
        positions: 1-based positions of `values` in the descending spectrum, thinned.
        values: singular values at `positions`.
    """

    norm: Size
    relative_norm: Size | None
    stable_rank: Size | None
    effective_rank: Size | None
    energy: Share | None
    rank: Count
    positions: list[int]
    values: list[Size]


class Alignment(_Strict):
    """Subspace alignment with one merged model.

    Attributes:
        rank: q, directions of Δ_M that leave no more than the relative error.
        ratio: expert -> SAR.
    """

    rank: Count
    ratio: dict[str, Share | None]


class Interference(_Strict):
    """Pairs of experts; row s, column t.

    Attributes:
        cosine: ⟨Δ_s, Δ_t⟩/(‖Δ_s‖‖Δ_t‖).
        overlap_left: ‖U_sᵀU_t‖_F²/k of the leading left vectors (outputs).
        overlap_right: the same of the right vectors (inputs).
        sign_conflicts: share of entries with opposite signs.
        singular: singular task interference of the pair over Σσ of both.
        activation: tr(Δ_s A_t Δ_sᵀ)/tr(Δ_t A_t Δ_tᵀ): how much s moves outputs on t's data, in
            units of what t itself does. Null where t has no statistics; None without any.
    """

    cosine: Pairs
    overlap_left: Pairs
    overlap_right: Pairs
    sign_conflicts: Pairs
    singular: Pairs
    activation: Pairs | None = None


class Layer(_Strict):
    """One matrix.

    Attributes:
        name: the tensor, with `[block][part]` for stacks and fused matrices.
        shape: [out, in].
        leading: k, the triplets of each expert that overlaps and energies are about.
        base_norm: ‖W₀‖_F.
        experts: expert -> spectrum of Δ_t.
        sum: spectrum of ΣΔ_t.
        merged: merged model -> spectrum of Δ_M.
        alignment: merged model -> SAR.
        singular_task_interference: ‖(UᵀU − I) Σ (VᵀV − I)‖₁ over all experts.
        interference: pairs of experts.
    """

    name: str
    shape: tuple[int, int]
    leading: Count
    base_norm: Size
    experts: dict[str, Spectrum]
    sum: Spectrum
    merged: dict[str, Spectrum]
    alignment: dict[str, Alignment]
    singular_task_interference: Size
    interference: Interference


class TaskSummary(_Strict):
    """One expert over all layers.

    Attributes:
        norm: of the whole task vector's matrices, √Σ‖Δ_t‖².
        relative_norm: that over √Σ‖W₀‖².
        stable_rank: mean over layers.
        effective_rank: mean over layers.
        most_interfering: the expert that interferes most with this one.
        interference: by how much: by `activation` with statistics, else by `singular`.
        by: which of the two.
    """

    norm: Size
    relative_norm: Size | None
    stable_rank: Size | None
    effective_rank: Size | None
    most_interfering: str | None
    interference: Size | None
    by: Literal["activation", "singular"]


class MergedSummary(_Strict):
    """One merged model over all layers.

    Attributes:
        sar: mean of the tasks' means.
        task_sar: expert -> mean SAR over layers.
        nai: expert -> normalised accuracy improvement, as far as results tell.
        mean_nai: mean over the experts that have one.
        rank: mean of q over layers.
        effective_rank: mean over layers.
    """

    sar: Share | None
    task_sar: dict[str, Share | None]
    nai: dict[str, float | None]
    mean_nai: float | None
    rank: Size
    effective_rank: Size | None


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
    """The whole model.

    Attributes:
        tasks: per expert.
        merged: per merged model.
        interference: pairs over all layers: the cosine of whole task vectors, means over layers,
            and the median for `activation`.
        correlation: SAR against NAI; None without results.
    """

    tasks: dict[str, TaskSummary]
    merged: dict[str, MergedSummary]
    interference: Interference
    correlation: SarNai | None = None


class Inspection(_Strict):
    """Everything that was measured.

    Attributes:
        schema_version: of this file's form.
        eutectic: version of the package.
        base: path of the base, as it was named.
        experts: name -> path.
        merged: name -> path.
        error: relative error in the definition of q.
        pattern: of layers, if one was given.
        notes: what a reader should know.
        summary: the whole model.
        layers: one entry per matrix.
    """

    schema_version: Literal[1] = 1
    eutectic: str
    base: str
    experts: dict[str, str]
    merged: dict[str, str]
    error: float
    pattern: str | None
    notes: list[str]
    summary: Summary
    layers: list[Layer]


def schema_text() -> str:
    """Return the JSON schema of inspection.json, as published in docs/schemas."""
    schema = Inspection.model_json_schema(mode="serialization")
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID}
    return json.dumps({**head, **schema}, indent=1, ensure_ascii=False) + "\n"
