"""What a request says of vocabularies that differ. Every dialect of recipes fills this record."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

POLICIES = ("error", "base", "union", "intersection")
MOST_TOKENS = 10_000  # of rules about single tokens


class TokenRow(BaseModel, extra="forbid", frozen=True):
    """The row of one token in one model."""

    model: str  # "base" or an expert's name
    token: str | None = None  # the token there; None where it is the same
    row: Annotated[int, Field(ge=0)] | None = None  # or its row

    @model_validator(mode="after")
    def _one_way(self) -> TokenRow:
        if self.token is not None and self.row is not None:
            raise ValueError("give token or row, not both")
        return self


class TokenRule(BaseModel, extra="forbid", frozen=True):
    """Where the row of one token comes from in models that lack it, or in all with `force`."""

    source: Annotated[TokenRow | Literal["mean", "zero"], Field(union_mode="left_to_right")]
    force: bool = False
    add: bool = False  # to the tokenizer too, where the output's lacks the token

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """Read `<token>: NAME` and `<token>: {source: NAME}` as that model's row."""
        given: Any = {"source": value} if isinstance(value, str) else value
        if isinstance(given, dict) and isinstance(given.get("source"), str):
            source = given["source"]
            if source not in ("mean", "zero"):
                given = {**given, "source": {"model": source}}
        return given


class VocabularyPolicy(BaseModel, extra="forbid", frozen=True):
    """Which tokens the output has, and which tokenizer.

    `error` refuses tables of different size and rows that stand for different tokens. `base` and
    an expert's name take that model's tokenizer, `union` the base's with the tokens that experts
    add, `intersection` the base's without the tokens that any expert lacks.
    """

    source: Annotated[str, Field(min_length=1, max_length=200)] = "error"
    tokens: Annotated[dict[str, TokenRule], Field(max_length=MOST_TOKENS)] = Field(
        default_factory=dict
    )
    # Rows of the table beyond the last token: those of the tokenizer's model, or none.
    padding: Literal["keep", "trim"] = "keep"
    pad_to_multiple_of: Annotated[int, Field(ge=1, le=1 << 20)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @property
    def model(self) -> str:
        """The model whose tokenizer the output's begins with."""
        return "base" if self.source in POLICIES else self.source
