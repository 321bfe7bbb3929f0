"""What a recipe may say. Unknown keys are refused; see `load.py` for files and line numbers."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    field_validator,
    model_validator,
)

from eutectic.errors import RequestError
from eutectic.options import dtype_name
from eutectic.recipes.named_values import name_and_values
from eutectic.recipes.script import Script
from eutectic.recipes.settings import scalars, setting_of
from eutectic.recipes.units import parse_bytes
from eutectic.types import Treatment
from eutectic.vocabulary.policy import VocabularyPolicy

MOST_RULES = 1_000
MOST_DIRECTIONS = 100_000  # of a layer of an adapter; no more than the layer has are taken
# Also the name of a folder, which file systems bound.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$", max_length=200)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]


Split = Annotated[
    Annotated[int, Field(ge=2), Tag("parts")]
    | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2), Tag("heights")],
    Discriminator(lambda value: "heights" if isinstance(value, (list, tuple)) else "parts"),
]


def _kind_of_spread(value: object) -> str:
    if isinstance(value, Mapping):
        return SPREAD_TAGS[2]
    return SPREAD_TAGS[isinstance(value, (list, tuple))]


def _is_setting(value: Any) -> Any:
    if not all(isinstance(s, (int, float)) and isfinite(s) for s in scalars(setting_of(value))):
        raise ValueError("every value must be a finite number")
    return value


# A number, numbers over depth, or `{match: PATTERN, value: …}`; pydantic's words in locations.
SPREAD_TAGS = ("<number>", "<values>", "<case>")
Spread = Annotated[
    Annotated[Finite, Tag(SPREAD_TAGS[0])]
    | Annotated[list[Any], AfterValidator(_is_setting), Tag(SPREAD_TAGS[1])]
    | Annotated[dict[str, Any], AfterValidator(_is_setting), Tag(SPREAD_TAGS[2])],
    Discriminator(_kind_of_spread),
]
LayerRange = tuple[
    Annotated[int, Field(ge=0, strict=True)], Annotated[int, Field(ge=1, strict=True)]
]


class ExpertSpec(BaseModel, extra="forbid", frozen=True):
    """One expert: a checkpoint or an adapter fine-tuned from the base."""

    path: str  # folder, file or hub id
    adapter: str | None = None  # a LoRA adapter that is merged into that checkpoint first
    weight: Spread = 1.0  # w_t in the method's formula
    statistics: str | None = None  # its statistics file, for methods that use data
    parameters: dict[str, Any] = Field(default_factory=dict)  # where they differ from the recipe's


class TensorRule(BaseModel, extra="forbid", frozen=True):
    """One rule about tensors by name; the first rule that matches a name decides."""

    match: Annotated[
        str, Field(max_length=1000)
    ]  # shell pattern over tensor names (`*.classifier.*`)
    treatment: Treatment | None = None  # None leaves the default
    split: Split | None = (
        None  # rows are so many fused matrices of equal height, or of these heights
    )
    scale: Finite | None = None  # α of these tensors instead of the recipe's
    method: str | None = None  # that merges them instead of the recipe's
    parameters: dict[str, Any] = Field(default_factory=dict)  # on top of the recipe's
    weights: dict[str, Spread] = Field(default_factory=dict)  # w_t of experts, by name

    @model_validator(mode="after")
    def _says_something(self) -> TensorRule:
        if not self.model_fields_set - {"match"}:
            raise ValueError(
                "the rule says nothing: give treatment, split, scale, method, parameters or weights"
            )
        return self


class LayerSpec(BaseModel, extra="forbid", frozen=True):
    """Layers of the output that come from the same experts, and what differs there."""

    # expert -> [first, end) of its layers; "base": of the base's, the first expert's by default
    take: Annotated[dict[str, LayerRange], Field(min_length=1)]
    weights: dict[str, Spread] = Field(default_factory=dict)
    parameters: dict[str, Any] = Field(default_factory=dict)
    # expert -> parameters of its own here
    parameters_of: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _ranges_alone(cls, value: Any) -> Any:
        if isinstance(value, dict) and not cast("set[Any]", set(value)) & set(cls.model_fields):
            return {"take": value}
        return value

    @model_validator(mode="after")
    def _ranges(self) -> LayerSpec:
        if any(first >= end for first, end in self.take.values()):
            raise ValueError("layers are [first, end], of which the end is not taken")
        return self


class AdapterOptions(BaseModel, extra="forbid", frozen=True):
    """How an output that is an adapter holds the merged change.

    Without `rank` and `energy` nothing is lost: as many directions as the experts have together.
    """

    rank: int | Literal["auto"] | None = None  # most directions of a layer
    energy: Annotated[float, Field(gt=0, le=1)] | None = None  # share of ‖Δ‖² kept in each layer
    tables: Literal["save", "low_rank"] = "save"  # tables of tokens, read and written
    # Changes of norms, biases and bare parameters, which thin factors do not hold.
    others: Literal["error", "drop", "save"] = "error"
    # Whether the experts are brought to `rank` shared directions before they are merged (CtM,
    # arXiv 2606.03723), or what is merged is cut after.
    compress: Literal["before", "after"] = "after"
    # How far the experts' changes are brought to one norm where their shared directions are looked
    # for: 0 as they are, 1 all alike (β = 1 − balance in the code of CtM's authors).
    balance: Annotated[float, Field(ge=0, le=1)] = 0.0
    # What a cut after the merge keeps: the most of ‖Δ‖², or by the experts' statistics of ‖Δx‖².
    cut: Literal["plain", "inputs"] = "plain"

    @field_validator("rank", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool)
        if value is None or value == "auto" or (number and 1 <= value <= MOST_DIRECTIONS):
            return value
        raise ValueError(f"is a number of directions from 1 to {MOST_DIRECTIONS:,}, or auto")

    @model_validator(mode="after")
    def _rank_to_compress_to(self) -> AdapterOptions:
        stated = "compress" in self.model_fields_set
        if stated and self.most is None and self.share is None:
            raise ValueError(f"compress: {self.compress} needs a rank (--rank N)")
        if self.compress == "before" and (self.most is None or self.energy is not None):
            raise ValueError("compress: before takes a rank that is a number, and no energy")
        if "balance" in self.model_fields_set and self.compress != "before":
            raise ValueError(
                f"balance: {self.balance:g} says how experts are brought to shared directions, "
                "which compress: before does"
            )
        if "cut" in self.model_fields_set and self.most is None and self.share is None:
            raise ValueError(f"cut: {self.cut} needs a rank (--rank N)")
        if self.cut == "inputs" and self.compress == "before":
            raise ValueError(
                "cut: inputs cuts what is merged; compress: before leaves no cut to it"
            )
        return self

    @property
    def before(self) -> int | None:
        """Directions of a layer to which experts are brought before they are merged, if any."""
        return self.most if self.compress == "before" else None

    @property
    def most(self) -> int | None:
        """The most directions of a layer; None where there is no bound."""
        return self.rank if isinstance(self.rank, int) else None

    @property
    def share(self) -> float | None:
        """The energy to keep; None where the rank alone says what is kept."""
        return 0.99 if self.rank == "auto" and self.energy is None else self.energy


NOT_TAKEN = {  # search -> keys of `scale: {…}` that are not its own
    "gram": frozenset({"tasks", "compare", "range", "points", "tolerance"}),
    "norm": frozenset({"tasks", "compare", "range", "points", "tolerance"}),
    "validation": frozenset({"compare"}),
    "divergence": frozenset[str](),
}


_CLOSED = ("gram", "norm")  # searches that take no keys


class ScaleSearch(BaseModel, extra="forbid", frozen=True):
    """A search for α in place of its value. `scale: auto` is `{search: gram}`, `norm` itself.

    `validation` optimises a metric on labelled data, `divergence` the distance of the merged
    model's outputs from each expert's on unlabelled data, `gram` the error of layer outputs, in
    closed form from statistics; `norm` makes the change as large as the experts' own.
    """

    search: Literal["validation", "divergence", "gram", "norm"]
    tasks: str | None = None  # file of tasks (YAML) with the data; `gram` and `norm` take none
    # Of `divergence`: probabilities (KL) and predicted numbers, or features before the head.
    compare: Literal["outputs", "features"] = "outputs"
    range: tuple[PositiveFinite, PositiveFinite] = (0.02, 3.0)  # smallest and largest α
    points: Annotated[int, Field(ge=3, le=1000)] = 11  # of the first, logarithmic grid
    # Relative precision of α at which the golden section around the best one stops.
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.05

    @property
    def runs_models(self) -> bool:
        """Whether α is chosen by what models make of data."""
        return self.search not in _CLOSED

    @model_validator(mode="after")
    def _fits_together(self) -> ScaleSearch:
        if idle := sorted(self.model_fields_set & NOT_TAKEN[self.search]):
            closed = "is a closed form and " if self.search in _CLOSED else ""
            raise ValueError(f"search: {self.search} {closed}takes no {', '.join(idle)}")
        if self.search not in _CLOSED and self.tasks is None:
            raise ValueError(f"search: {self.search} needs tasks, a file that names the data")
        if self.range[0] >= self.range[1]:
            raise ValueError(f"range is [smallest, largest], got {list(self.range)}")
        return self


SCALE_TAGS = ("<number>", "<search>")  # pydantic's words in locations, left out of messages


def _kind_of_scale(value: object) -> str:
    return SCALE_TAGS[isinstance(value, (Mapping, ScaleSearch))]


Scale = Annotated[
    Annotated[Finite, Tag(SCALE_TAGS[0])] | Annotated[ScaleSearch, Tag(SCALE_TAGS[1])],
    Discriminator(_kind_of_scale),
]


def _post(value: object) -> object:
    """Return a post-processor with its parameters apart; one without any by its name."""
    if isinstance(value, str) and ":" in value:
        try:
            name, parameters = name_and_values(value, "post-processor", "svc:metric=inputs")
        except RequestError as error:
            raise ValueError(str(error)) from None
        return {"method": name, **parameters} if parameters else name
    if isinstance(value, Mapping):
        stated = dict(cast("Mapping[str, Any]", value))
        return stated["method"] if set(stated) == {"method"} else stated
    if value is not None and not isinstance(value, str):
        raise ValueError("a name, or {method: NAME, PARAMETER: VALUE, …}")
    return value


class Recipe(BaseModel, extra="forbid", frozen=True):
    """What to merge, and how; docs/guides/recipes.md says what each key does."""

    # Folder, file or hub id of the model that all experts started from. None: the experts are
    # merged as they are, by a method that works on weights.
    base: str | None
    base_adapter: str | None = None  # a LoRA adapter that is merged into it first
    experts: Annotated[dict[Name, ExpertSpec], Field(min_length=1)]  # or name -> path
    method: str  # a name from `eutectic methods`
    parameters: dict[str, Any] = Field(default_factory=dict)  # the method's own
    # What follows the merge of every matrix: a name, or `{method: NAME, PARAMETER: VALUE, …}`.
    post: Annotated[str | dict[str, Any] | None, BeforeValidator(_post)] = None
    scale: Scale | None = None  # α, or a search for it; None takes the method's default
    scale_tensors: Literal["all", "matrix"] = "all"  # what α multiplies
    # Kernels of convolutions: averaged, or as matrices `[out, in·k·k]` over the patches they see.
    convolutions: Literal["average", "matrix"] = "average"
    # Of the output, also as bf16, fp16, fp32, fp64; None leaves every tensor in its own.
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # of all random numbers
    precision: Literal["fast", "exact"] = "fast"  # checked kernels, or float64 decompositions
    tensors: Annotated[tuple[TensorRule, ...], Field(max_length=MOST_RULES)] = ()
    # Where the output's layers come from, from the first; empty: from the same of every model.
    layers: Annotated[tuple[LayerSpec, ...], Field(max_length=MOST_RULES)] = ()
    heads: Literal["per_expert", "base", "drop"] = "per_expert"  # kept in `experts/<name>/`
    # A base tensor that some expert lacks: unchanged there, or merged from those that have it.
    missing: Literal["error", "base", "available"] = "error"
    # Tensors of an expert that the base lacks, are no heads, and may be the base's by other names.
    unmatched: Literal["error", "leave"] = "error"
    nonfinite: Literal["error", "allow"] = "error"  # NaN or Inf, read or to be written
    side_files: str = "base"  # or the expert whose configuration and tokenizer files are copied
    # Which tokens the output has where vocabularies differ; None matches rows by their number.
    vocabulary: VocabularyPolicy | None = None
    # Of the output's tokenizer: `auto`, the name of a known one, or Jinja; None leaves it.
    chat_template: Annotated[str, Field(min_length=1, max_length=200_000)] | None = None
    statistics_of: Literal["expert", "any"] = "expert"  # the checkpoint they were collected on
    # A method whose statistics are missing as a whole, of all experts or of one: its fall-back.
    fallback: Literal["error", "allow"] = "error"
    # Most bytes of tensors in one file, such as "5GB"; None lays the output out like the base.
    shard_size: Annotated[int, Field(ge=1, strict=True)] | None = None

    output: Literal["model", "adapter"] = "model"  # a checkpoint like the base, or a PEFT adapter
    adapter: AdapterOptions | None = None  # how an adapter holds the change; asks for one

    # What is said of single tensors; no key of its own, since several keys make it.
    _script: Script | None = PrivateAttr(default=None)

    @property
    def reference(self) -> str:
        """The model that lends names, shapes and configuration: the base, or the first expert."""
        return next(iter(self.experts.values())).path if self.base is None else self.base

    @property
    def runs_models(self) -> bool:
        """Whether a search for α runs models on data."""
        return isinstance(self.scale, ScaleSearch) and self.scale.runs_models

    @property
    def script(self) -> Script | None:
        """What the recipe says of single tensors; None where it says the same of all."""
        return self._script

    def with_script(self, script: Script) -> Recipe:
        """Return the recipe with what it says of single tensors."""
        recipe = self.model_copy()
        recipe._script = script  # pyright: ignore[reportAttributeAccessIssue] - a private attribute
        return recipe

    @property
    def adapter_options(self) -> AdapterOptions | None:
        """How the output holds the change, where it is an adapter."""
        if self.output == "model":
            return None
        return self.adapter or AdapterOptions()

    @model_validator(mode="before")
    @classmethod
    def _adapter_asked_for(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("adapter") is None:
            return values
        stated = cast("dict[str, Any]", values)
        if stated["adapter"] is True:
            stated = {**stated, "adapter": {}}
        return {"output": "adapter", **stated}

    @model_validator(mode="after")
    def _adapter_taken(self) -> Recipe:
        if self.adapter is not None and self.output == "model":
            raise ValueError("adapter says how one is written, and output: model asks for none")
        return self

    @field_validator("experts", mode="before")
    @classmethod
    def _paths_alone(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            raise ValueError(
                "is a list; say what each expert is called: {sst2: ./sst2, mnli: ./mnli}"
            )
        if not isinstance(value, dict):
            return value
        specs = cast("dict[Any, Any]", value)
        if name := next((name for name in ("base", "initial") if name in specs), None):
            raise ValueError(f"an expert cannot be called '{name}': that is another parent's name")
        return {n: {"path": s} if isinstance(s, str) else s for n, s in specs.items()}

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype(cls, value: Any) -> Any:
        return dtype_name(value)

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
        if value == "norm":
            return {"search": "norm"}
        if isinstance(value, str):
            try:
                float(value)
            except ValueError:
                allowed = "a number, auto, norm, or {search: …, tasks: …}"
                raise ValueError(f"a scale is {allowed}") from None
        return value
