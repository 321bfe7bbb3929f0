"""What a recipe may say. Unknown keys are refused; see `load.py` for files and line numbers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from eutectic.types import Treatment

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _kind_of_split(value: object) -> str:
    return "heights" if isinstance(value, (list, tuple)) else "parts"


Split = Annotated[
    Annotated[int, Field(ge=2), Tag("parts")]
    | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2), Tag("heights")],
    Discriminator(_kind_of_split),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExpertSpec(_Strict):
    """One expert: a checkpoint or an adapter fine-tuned from the base.

    Attributes:
        path: folder, file or hub id.
        weight: w_t in the method's formula.
        statistics: the expert's statistics file, for methods that use data.
    """

    path: str
    weight: Finite = 1.0
    statistics: str | None = None


class TensorRule(_Strict):
    """One rule about tensors by name; the first rule that matches a name decides.

    Attributes:
        match: shell pattern over tensor names (`*.classifier.*`).
        treatment: what becomes of the tensor; None leaves the default.
        split: rows are this many fused matrices of equal height, or of these heights.
        scale: α of these tensors instead of the recipe's.
    """

    match: str
    treatment: Treatment | None = None
    split: Split | None = None
    scale: Finite | None = None

    @model_validator(mode="after")
    def _says_something(self) -> TensorRule:
        if self.treatment is None and self.split is None and self.scale is None:
            raise ValueError("the rule says nothing: give treatment, split or scale")
        return self


class Recipe(_Strict):
    """What to merge, and how.

    Attributes:
        base: folder, file or hub id of the model that all experts started from.
        experts: name -> path, or name -> {path, weight, statistics}.
        method: a name from `eutectic methods`.
        parameters: the method's own parameters.
        scale: α; None takes the method's default.
        scale_tensors: what α multiplies: every merged tensor, or matrices only.
        dtype: of the output's floating tensors; None keeps each tensor's own.
        seed: of all random numbers.
        precision: linear algebra by checked fast kernels, or by full float64 decompositions.
        tensors: ordered rules by tensor name.
        heads: per-task heads kept in `experts/<name>/`, taken from the base, or left out.
        missing: a base tensor that some expert lacks is an error, counts as unchanged (`base`),
            or is merged from those that have it (`available`).
        nonfinite: NaN or Inf in an expert is an error, or allowed through.
        side_files: "base", or the expert whose config and tokenizer files are copied.
    """

    base: str
    experts: Annotated[dict[Name, ExpertSpec], Field(min_length=1)]
    method: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    scale: Finite | None = None
    scale_tensors: Literal["all", "matrix"] = "all"
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["fast", "exact"] = "fast"
    tensors: tuple[TensorRule, ...] = ()
    heads: Literal["per_expert", "base", "drop"] = "per_expert"
    missing: Literal["error", "base", "available"] = "error"
    nonfinite: Literal["error", "allow"] = "error"
    side_files: str = "base"

    @field_validator("experts", mode="before")
    @classmethod
    def _paths_alone(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        specs = cast("dict[Any, Any]", value)
        return {n: {"path": s} if isinstance(s, str) else s for n, s in specs.items()}
