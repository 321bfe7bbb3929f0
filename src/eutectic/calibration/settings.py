"""What a calibration is asked for, checked before any work."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from eutectic.data.encoded_rows import BatchOptions
from eutectic.errors import RequestError, suggest
from eutectic.options import listed, not_names, not_numbers, unset

SITES = ("matrices", "biases", "norms", "convolutions")
_HOW = ("reading", "threads", "restart")  # they decide no byte, or only through the data


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keywords of `calibrate`; see there."""

    ridge: float = 0.05
    anchor_scale: float = 1.0
    expert_share: float = 0.25
    sites: Sequence[str] = SITES
    layers: Sequence[str] | None = None
    samples: int | None = 256
    holdout: float = 0.0
    seed: int = 0
    task: str | None = None
    reading: BatchOptions = BatchOptions()
    threads: int | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        """Take one site or pattern by itself."""
        for name in ("sites", "layers"):
            object.__setattr__(self, name, listed(getattr(self, name)))

    def check(self) -> None:
        """Raise RequestError naming everything that is out of range."""
        shares = ("ridge", "anchor_scale", "expert_share", "holdout")
        counts, optional = ("samples", "seed", "threads"), unset(Settings)
        faults = [
            *not_numbers({n: getattr(self, n) for n in shares}, whole=False),
            *not_numbers({n: getattr(self, n) for n in counts}, whole=True, optional=optional),
            *not_names({"sites": self.sites, "layers": self.layers}, optional=optional),
        ]
        if faults:
            raise RequestError("calibrate refuses its arguments:\n  - " + "\n  - ".join(faults))
        if not -(2**63) <= self.seed < 2**64:
            faults.append(f"seed must have at most 64 bits; got {self.seed}")
        if not 0 <= self.ridge < math.inf:
            faults.append(f"ridge must be at least 0, and finite; got {self.ridge}")
        if not math.isfinite(self.anchor_scale):
            faults.append(f"anchor_scale must be finite; got {self.anchor_scale}")
        if not 0 <= self.expert_share <= 1:
            faults.append(f"expert_share must be between 0 and 1; got {self.expert_share}")
        if not 0 <= self.holdout < 1:
            faults.append(f"holdout must be at least 0 and less than 1; got {self.holdout}")
        for name, value in {"samples": self.samples, "threads": self.threads}.items():
            if value is not None and value < 1:
                faults.append(f"{name} must be at least 1; got {value}")
        faults += [
            f"sites are {', '.join(SITES)}; got '{name}'.{suggest(name, SITES)}"
            for name in self.sites
            if name not in SITES
        ]
        if not self.sites:
            faults.append(f"no sites are named; there are {', '.join(SITES)}")
        if faults:
            raise RequestError("calibrate refuses its arguments:\n  - " + "\n  - ".join(faults))

    def describe(self) -> dict[str, Any]:
        """Return what decides the output's bytes, besides checkpoints and data, as JSON values."""
        return {
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name not in _HOW},
            "sites": [name for name in SITES if name in self.sites],
            "layers": None if self.layers is None else list(self.layers),
        }


class CalibrateOptions(TypedDict, total=False):
    """Further keywords of `calibrate`; see there, and `Settings` for the defaults."""

    ridge: float
    anchor_scale: float
    expert_share: float
    sites: Sequence[str]
    layers: Sequence[str] | None
    samples: int | None
    holdout: float
    seed: int
    task: str | None
    reading: BatchOptions
    threads: int | None
    restart: bool
