"""One case, and what all cases read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inputs import DEMO_EXPERTS, NAMES


@dataclass(frozen=True)
class Case:
    """Something to do.

    Attributes:
        name: unique; parts are separated by slashes.
        run: writes into the folder that it is given; what it returns is hashed too.
    """

    name: str
    run: Callable[[Path], Any]


@dataclass(frozen=True)
class World:
    """Where the inputs are, and how many threads merges take."""

    inputs: Path
    threads: int

    def family(
        self,
        kind: str,
        form: str = "f32",
        names: Sequence[str] = NAMES,
        *,
        statistics: bool = False,
    ) -> dict[str, Any]:
        """Return base and experts of one architecture, as keys of a recipe."""
        folder = self.inputs / f"{kind}-{form}"
        experts: dict[str, dict[str, Any]] = {n: {"path": str(folder / n)} for n in names}
        if statistics:
            for name in names:
                experts[name]["statistics"] = str(self.stats(kind, name))
        return {"base": str(folder / "base"), "experts": experts}

    def stats(self, kind: str, name: str) -> Path:
        """Return the statistics file of an expert."""
        return self.inputs / "stats" / kind / f"{name}.safetensors"

    def adapters(self, kind: str, *, statistics: bool = False) -> dict[str, Any]:
        """Return the base and the adapters of one architecture."""
        experts: dict[str, dict[str, Any]] = {
            n: {"path": str(self.inputs / "lora" / kind / n)} for n in NAMES
        }
        if statistics:
            for name in NAMES:
                file = self.inputs / "stats" / "adapters" / f"{kind}-{name}.safetensors"
                experts[name]["statistics"] = str(file)
        return {"base": str(self.inputs / f"{kind}-f32" / "base"), "experts": experts}

    def odd(self, names: Sequence[str] = NAMES) -> dict[str, Any]:
        """Return the base and some of the odd checkpoints."""
        folder = self.inputs / "odd"
        return {"base": str(folder / "base"), "experts": {n: str(folder / n) for n in names}}

    def demo(
        self, names: Sequence[str] = DEMO_EXPERTS, *, statistics: bool = False
    ) -> dict[str, Any]:
        """Return the demo's base and adapters."""
        folder = self.inputs / "demo"
        experts: dict[str, dict[str, Any]] = {
            n: {"path": str(folder / "experts" / n)} for n in names
        }
        if statistics:
            for name in names:
                experts[name]["statistics"] = str(folder / "stats" / f"{name}.safetensors")
        return {"base": str(folder / "base"), "experts": experts}

    def tasks(self, kind: str) -> str:
        """Return a file of tasks."""
        return str(self.inputs / "data" / f"{kind}.yaml")

    def merge(self, recipe: Mapping[str, Any], **options: Any) -> Callable[[Path], Any]:
        """Return what merges a recipe and gives its report."""

        def run(out: Path) -> Any:
            import eutectic

            limits = {"threads": self.threads, **options}
            return eutectic.merge(dict(recipe), output=out / "merged", **limits)

        return run
