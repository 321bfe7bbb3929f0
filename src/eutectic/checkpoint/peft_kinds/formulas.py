"""What an adapter's parts mean for one weight: a formula of tensors, without files or names.

A weight is seen as a linear map W₀ `[out, in]`, kernels flattened to `[out, in·k]`, however the
base stores it. The formulas are those of PEFT's documentation and papers; where its code settles
what a paper leaves open, `merge_and_unload` is what they are held to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from eutectic.checkpoint.adapter_config import PatternTable, pattern_table
from eutectic.checkpoint.stated import checked
from eutectic.errors import CheckpointError

Parts = Mapping[str, Tensor]
Shape = tuple[int, ...]
# (parts, W₀ [out, in·k]) -> Δ [out, in·k]; W₀ may be empty where `on_base` is False.
Compute = Callable[[Parts, Tensor], Tensor]


@dataclass(frozen=True)
class Formula:
    """How Δ is computed from an adapter's parts."""

    compute: Compute
    on_base: bool = False  # whether it looks at W₀
    matrices: float = 2.0  # matrices of the weight's size held at once, the result among them
    transposed: bool | None = None  # whether the base keeps [in, out]; None: shapes tell


class Settings(BaseModel):
    """What every kind may state; names as in PEFT."""

    model_config = ConfigDict(extra="ignore")

    rank_pattern: Mapping[str, Any] | None = None
    alpha_pattern: Mapping[str, Any] | None = None
    fan_in_fan_out: bool | None = False
    peft_version: str | None = None


Stated = TypeVar("Stated", bound=BaseModel)
Rank = Field(ge=1, le=1_000_000)
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]  # what torch's generators take
# Part -> how many places there are for each row of indices in it; None where it is not known.
Places = Mapping[str, tuple[int | None, ...]]


@dataclass(frozen=True)
class AdapterSettings:
    """The configuration of an adapter, and its patterns over modules."""

    raw: Mapping[str, Any]
    where: object  # the file, for messages
    common: Settings
    ranks: PatternTable[Any]
    alphas: PatternTable[Any]

    def stated(self, model: type[Stated]) -> Stated:
        """Return the fields that a kind asks for; CheckpointError names the first wrong one."""
        return checked(model, self.raw, self.where, CheckpointError)

    def rank(self, module: str, default: int) -> int:
        """Return r of a module (its path in the model that was adapted)."""
        rank = self.ranks.value(module, default)
        if not isinstance(rank, int) or rank < 1:
            raise CheckpointError(f"{self.where}: 'rank_pattern' gives '{module}' the rank {rank}.")
        return rank

    def alpha(self, module: str, default: float) -> float:
        """Return α of a module."""
        return float(self.alphas.value(module, default))


def settings_of(raw: Mapping[str, Any], where: object) -> AdapterSettings:
    """Return an adapter's configuration, of which the common fields are checked."""
    common = checked(Settings, raw, where, CheckpointError)
    plain = {"rank_pattern": common.rank_pattern or {}, "alpha_pattern": common.alpha_pattern or {}}
    if raw.get("peft_type") == "ADALORA":
        plain["rank_pattern"] = {}  # masks over ranks, already applied to what is stored
    tables = {f: pattern_table(p, f"{where}: '{f}'") for f, p in plain.items()}
    return AdapterSettings(raw, where, common, tables["rank_pattern"], tables["alpha_pattern"])


@dataclass(frozen=True)
class Layer:
    """One tensor that an adapter changes."""

    module: str  # path in the adapted model
    shape: Shape  # of the base's tensor, [out, in, *kernel] unless it is stored turned
    parts: Mapping[str, Shape]  # part -> shape, of parts that all layers share too
    settings: AdapterSettings
    sizes: tuple[tuple[int, int], ...] = ()  # (out, in) of all layers, for VeRA


def refuse(layer: Layer, what: str) -> CheckpointError:
    """Return the error that parts of a layer cannot be what they should."""
    shapes = ", ".join(f"{part} {list(shape)}" for part, shape in layer.parts.items())
    return CheckpointError(f"'{layer.module}': {what} (its parts: {shapes}).")


def fits(formula: Formula, layer: Layer, out: int, width: int) -> bool:
    """Tell whether the parts make a change of `[out, width]`, from shapes alone."""
    parts = {part: torch.empty(shape, device="meta") for part, shape in layer.parts.items()}
    base = torch.empty(out, width, device="meta")
    try:
        return formula.compute(parts, base).shape == (out, width)
    except (RuntimeError, IndexError, ValueError, KeyError, NotImplementedError, TypeError):
        return False
