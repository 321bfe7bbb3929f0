"""What a collection is asked to do, checked before anything runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import nn

from eutectic.cluster.where import ExecutorName
from eutectic.errors import RequestError
from eutectic.models.batches import TokenMask, Unmatched
from eutectic.models.linear_head import Head
from eutectic.options import dtype_name, listed, not_names, not_numbers, unset
from eutectic.statistics.core_rows import CoreRows
from eutectic.statistics.function_identity import describe_callable
from eutectic.statistics.gram import Rank
from eutectic.statistics.likelihood import OBJECTIVES, LogLikelihood, Objective, objective_name

Labels = Literal["data", "sample"]
DEFAULT_GRADIENT_EXAMPLES = 1000
# These change how statistics are collected; layers that a limit leaves out are listed in the file.
_HOW = (
    *("share_inputs", "output_gradient_limit", "block_limit", "memory_bytes"),
    *("layers_per_pass", "fingerprint", "snapshot_seconds", "min_tokens"),
)
_COUNTS = ("max_examples", "min_tokens", "memory_bytes", "layers_per_pass")  # of at least 1
_WHOLE = ("max_examples", "min_tokens", "layers_per_pass", "seed")
_MEASURED = ("memory_bytes", "output_gradient_limit", "block_limit", "snapshot_seconds")  # 4e9 too


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of `collect`.

    All but `min_tokens` and the last four decide what its file holds.
    """

    grams: bool = True
    output_gradients: bool = False
    fisher: bool = False
    block_fisher: bool = False
    labels: Labels = "data"
    objective: Objective | LogLikelihood | Literal["auto"] = "auto"
    head: Head | None = None
    max_examples: int | None = None
    min_tokens: int | None = None
    layers: Sequence[str] | None = None
    convolutions: bool = False
    rank: Rank | None = None
    core: CoreRows | None = None
    share_inputs: bool = True
    unmatched: Unmatched = "error"
    token_mask: TokenMask | None = None
    seed: int = 0
    output_gradient_limit: int = 16384
    block_limit: int = 4096
    dtype: torch.dtype = torch.float32
    memory_bytes: int | None = None
    layers_per_pass: int | None = None
    fingerprint: str | None = None
    snapshot_seconds: float = 60.0

    @property
    def gradients(self) -> bool:
        """Whether anything needs a backward pass."""
        return self.output_gradients or self.fisher or self.block_fisher

    @property
    def limit(self) -> int | None:
        """How many examples are used."""
        default = DEFAULT_GRADIENT_EXAMPLES if self.gradients else None
        return default if self.max_examples is None else self.max_examples

    def __post_init__(self) -> None:
        """Take names of dtypes too, such as "float64" or "fp64", and one pattern by itself."""
        named = getattr(torch, str(dtype_name(self.dtype)), None)
        object.__setattr__(self, "dtype", named if isinstance(named, torch.dtype) else self.dtype)
        object.__setattr__(self, "layers", listed(self.layers))

    def check(self) -> None:
        """Raise RequestError naming everything that is out of range."""
        optional = unset(Settings)
        faults = [
            *_choice("objective", objective_name(self.objective), ("auto", *OBJECTIVES)),
            *_choice("labels", self.labels, ("data", "sample")),
            *_choice("unmatched", self.unmatched, ("error", "all", "skip")),
            *_choice("dtype", self.dtype, (torch.float32, torch.float64)),
            *not_numbers({n: getattr(self, n) for n in _WHOLE}, whole=True, optional=optional),
            *not_numbers({n: getattr(self, n) for n in _MEASURED}, whole=False, optional=optional),
            *not_names({"layers": self.layers}, optional=optional),
        ]
        if faults:
            raise RequestError("collect refuses its arguments:\n  - " + "\n  - ".join(faults))
        counts = {name: getattr(self, name) for name in _COUNTS}
        for name, value in counts.items():
            if value is not None and value < 1:
                faults.append(f"{name} must be at least 1; got {value}")
        rank: Any = self.rank  # callers without a type checker may give anything
        if rank not in (None, "auto") and not (isinstance(rank, int) and rank >= 1):
            faults.append(f"rank must be at least 1, or 'auto'; got {self.rank!r}")
        if not (self.grams or self.gradients):
            faults.append("nothing is asked for: grams, output_gradients, fisher, block_fisher")
        if not self.gradients:
            # With their defaults they say nothing; otherwise they would be ignored.
            given = {
                "labels='sample'": self.labels == "sample",
                "objective": self.objective != "auto",
                "head": self.head is not None,
            }
            faults += [
                f"{name} is for gradients; ask for output_gradients, fisher or block_fisher"
                for name, is_given in given.items()
                if is_given
            ]
        if self.core is not None:
            beside = {
                "rank": self.rank,
                "convolutions": self.convolutions,
                "grams=False": not self.grams,
            }
            faults += [f"{n} does not go with core" for n, asked in beside.items() if asked]
        if faults:
            raise RequestError("collect refuses its arguments:\n  - " + "\n  - ".join(faults))

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values, for the file and for the identity of a run."""
        gradients = self.gradients
        core = {} if self.core is None else {"core": self.core.describe()}
        own = {name: value for name, value in vars(self).items() if name not in (*_HOW, "core")}
        return (
            own
            | core
            | {
                "labels": self.labels if gradients else None,
                "objective": _described(self.objective) if gradients else None,
                "head": self.head.fingerprint() if gradients and self.head else None,
                "seed": self.seed if gradients and self.labels == "sample" else None,
                "max_examples": self.limit,
                "layers": None if self.layers is None else list(self.layers),
                "token_mask": None if self.token_mask is None else _described(self.token_mask),
                "dtype": str(self.dtype).removeprefix("torch."),
            }
        )


class CollectOptions(TypedDict, total=False):
    """Further keywords of `collect`; see there, and `Settings` for the defaults."""

    fisher: bool
    block_fisher: bool
    labels: Labels
    objective: Objective | LogLikelihood | Literal["auto"]
    head: Head | None
    max_examples: int | None
    min_tokens: int | None
    layers: Sequence[str] | None
    convolutions: bool
    rank: Rank | None
    core: CoreRows | None
    share_inputs: bool
    unmatched: Unmatched
    token_mask: TokenMask | None
    seed: int
    output_gradient_limit: int
    block_limit: int
    dtype: torch.dtype
    memory_bytes: int | None
    layers_per_pass: int | None
    fingerprint: str | None
    snapshot_seconds: float
    executor: ExecutorName
    ray_address: str | None
    device: str
    shards: int | None
    open_model: Callable[[], nn.Module] | None


def _choice(name: str, value: object, allowed: tuple[object, ...]) -> list[str]:
    if callable(value) or value in allowed:
        return []
    return [f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}"]


def _described(value: Any) -> str:
    return value if isinstance(value, str) else describe_callable(value)
