"""What a recipe may say. Unknown keys are refused; see `load.py` for files and line numbers."""

from __future__ import annotations

from collections.abc import Mapping
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

from eutectic.errors import RequestError
from eutectic.recipes.units import parse_bytes
from eutectic.types import Treatment

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]


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
        parameters: the method's parameters for this expert, where they differ from the recipe's
            (a `density` of its own).
    """

    path: str
    weight: Finite = 1.0
    statistics: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


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


NOT_TAKEN = {  # search -> keys of `scale: {…}` that are not its own
    "gram": frozenset({"tasks", "compare", "range", "points", "tolerance"}),
    "validation": frozenset({"compare"}),
    "divergence": frozenset[str](),
}


class ScaleSearch(_Strict):
    """A search for α in place of its value. `scale: auto` is short for `{search: gram}`.

    Attributes:
        search: what is optimised: `validation` a metric on labelled data, `divergence` the
            distance of the merged model's outputs from each expert's on unlabelled data, `gram`
            the error of layer outputs, in closed form from statistics.
        tasks: file of tasks (YAML) with the data; `gram` takes none.
        compare: of `divergence`: outputs (KL of class or next-token probabilities, distance of
            predicted numbers), or features before the head.
        range: smallest and largest α.
        points: number of values of the first, logarithmic grid.
        tolerance: relative precision of α at which the golden section around the best one stops.
    """

    search: Literal["validation", "divergence", "gram"]
    tasks: str | None = None
    compare: Literal["outputs", "features"] = "outputs"
    range: tuple[PositiveFinite, PositiveFinite] = (0.02, 3.0)
    points: Annotated[int, Field(ge=3, le=1000)] = 11
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.05

    @model_validator(mode="after")
    def _fits_together(self) -> ScaleSearch:
        if idle := sorted(self.model_fields_set & NOT_TAKEN[self.search]):
            closed = "is a closed form and " if self.search == "gram" else ""
            raise ValueError(f"search: {self.search} {closed}takes no {', '.join(idle)}")
        if self.search != "gram" and self.tasks is None:
            raise ValueError(f"search: {self.search} needs tasks, a file that names the data")
        if self.range[0] >= self.range[1]:
            raise ValueError("range is [smallest, largest]")
        return self


SCALE_TAGS = ("<number>", "<search>")  # pydantic's words in locations, left out of messages


def _kind_of_scale(value: object) -> str:
    return SCALE_TAGS[isinstance(value, (Mapping, ScaleSearch))]


Scale = Annotated[
    Annotated[Finite, Tag(SCALE_TAGS[0])] | Annotated[ScaleSearch, Tag(SCALE_TAGS[1])],
    Discriminator(_kind_of_scale),
]


class Recipe(_Strict):
    """What to merge, and how.

    Attributes:
        base: folder, file or hub id of the model that all experts started from.
        experts: name -> path, or name -> {path, weight, statistics, parameters}.
        method: a name from `eutectic methods`.
        parameters: the method's own parameters.
        scale: α, or a search for it; None takes the method's default.
        scale_tensors: what α multiplies: every merged tensor, or matrices only.
        dtype: of the output's floating tensors; None keeps each tensor's own.
        seed: of all random numbers.
        precision: linear algebra by checked fast kernels, or by full float64 decompositions.
        tensors: ordered rules by tensor name.
        heads: per-task heads kept in `experts/<name>/`, taken from the base, or left out.
        missing: a base tensor that some expert lacks is an error, counts as unchanged (`base`),
            or is merged from those that have it (`available`).
        nonfinite: NaN or Inf in an expert is an error, or allowed through.
        statistics_of: statistics must have been collected on the `expert` itself, or may come from
            `any` checkpoint.
        side_files: "base", or the expert whose config and tokenizer files are copied.
        shard_size: most bytes of tensors in one file, such as "5GB"; None lays the output out like
            the base.
    """

    base: str
    experts: Annotated[dict[Name, ExpertSpec], Field(min_length=1)]
    method: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    scale: Scale | None = None
    scale_tensors: Literal["all", "matrix"] = "all"
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["fast", "exact"] = "fast"
    tensors: tuple[TensorRule, ...] = ()
    heads: Literal["per_expert", "base", "drop"] = "per_expert"
    missing: Literal["error", "base", "available"] = "error"
    nonfinite: Literal["error", "allow"] = "error"
    side_files: str = "base"
    statistics_of: Literal["expert", "any"] = "expert"
    shard_size: Annotated[int, Field(ge=1, strict=True)] | None = None

    @field_validator("experts", mode="before")
    @classmethod
    def _paths_alone(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        specs = cast("dict[Any, Any]", value)
        taken = [name for name in ("base", "initial") if name in specs]
        if taken:
            raise ValueError(
                f"an expert cannot be called '{taken[0]}': that is another parent's name"
            )
        return {n: {"path": s} if isinstance(s, str) else s for n, s in specs.items()}

    @field_validator("shard_size", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        try:
            return parse_bytes(value) if isinstance(value, str) else value
        except RequestError:
            raise ValueError("must be a size such as 5GB, 512MiB or 800000") from None

    @field_validator("scale", mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        if value == "auto":
            return {"search": "gram"}
        if isinstance(value, str):
            try:
                float(value)
            except ValueError:
                raise ValueError("a scale is a number, auto, or {search: …, tasks: …}") from None
        return value
