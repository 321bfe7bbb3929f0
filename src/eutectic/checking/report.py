"""What a check finds: faults are wrong, notes of level "warning" unusual, others worth knowing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eutectic.errors import EutecticError, Fault, Note, told
from eutectic.tables import InNotebooks, Shown, data_frame, facts

Finding = Fault | Note


@dataclass(frozen=True)
class Checked:
    """What a check found in one checkpoint or adapter.

    Attributes:
        path: as it was named.
        kind: "checkpoint", "adapter", or "nothing to read".
        model: the type of model, or the kind of adapter, as its configuration says.
        tensors: how many there are; quantised ones as the numbers they mean.
        numbers: how many numbers they hold.
        bytes: how many bytes the weights take in files.
        dtypes: dtype -> numbers of it, the most frequent first.
        faults: what is wrong: it cannot be read, or a model of it would not do what it should.
        notes: what is unusual (level "warning"), and what is worth knowing.
    """

    path: str
    kind: str = "nothing to read"
    model: str = ""
    tensors: int = 0
    numbers: int = 0
    bytes: int = 0
    dtypes: Mapping[str, int] = field(default_factory=dict[str, int])
    faults: tuple[Fault, ...] = ()
    notes: tuple[Note, ...] = ()

    @property
    def wrong(self) -> list[str]:
        """Return the faults as texts; like ones are one, with a count."""
        return [self._short(text) for text in told(self.faults)]

    @property
    def unusual(self) -> list[str]:
        """Return the warnings as texts."""
        return [self._short(note.text) for note in self.notes if note.level == "warning"]

    @property
    def remarks(self) -> list[str]:
        """Return the other notes as texts."""
        return [self._short(note.text) for note in self.notes if note.level != "warning"]

    def as_json(self) -> dict[str, Any]:
        """Return all of it for programs: the records, and their texts."""
        counts = ("path", "kind", "model", "tensors", "numbers", "bytes", "dtypes")
        return {
            **{name: getattr(self, name) for name in counts},
            **{name: getattr(self, name) for name in ("wrong", "unusual", "remarks")},
            "faults": [dataclasses.asdict(fault) for fault in self.faults],
            "notes": [dataclasses.asdict(note) for note in self.notes],
        }

    def _short(self, text: str) -> str:
        """Leave out the folder that the text stands under."""
        return text.removeprefix(f"{self.path}: ").removeprefix(f"{self.path.rstrip('/')}/")


@dataclass(frozen=True)
class CheckReport(InNotebooks):
    """What a check found in each of several checkpoints; iterates over them, in the given order."""

    checked: tuple[Checked, ...]

    def __iter__(self) -> Iterator[Checked]:
        return iter(self.checked)

    def to_pandas(self) -> Any:
        """Return a data frame, one row per checkpoint."""
        return data_frame((one.as_json() for one in self), "path")

    def __repr__(self) -> str:
        """Show each checkpoint with what is wrong or unusual in it."""
        return "\n".join(self._parts())

    def _parts(self) -> Sequence[Shown]:
        """Return the same for notebooks too."""
        told = [
            facts(
                one.path,
                {
                    "kind": f"{one.kind}, {one.model}" if one.model else one.kind,
                    "tensors": one.tensors,
                    "wrong": "\n".join(one.wrong),
                    "unusual": "\n".join(one.unusual),
                },
            )
            for one in self
        ]
        return [facts("CheckReport: " + ("sound" if self.sound else "not sound"), {}), *told]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong; unusual things may be."""
        return not any(checked.faults for checked in self.checked)


@dataclass
class Findings:
    """Faults and notes as they are found, each once."""

    faults: dict[Fault, None] = field(default_factory=dict[Fault, None])
    notes: dict[tuple[str, str], Note] = field(default_factory=dict[tuple[str, str], Note])

    def add(self, *findings: Finding) -> None:
        """Add faults and notes."""
        for finding in findings:
            if isinstance(finding, Fault):
                self.faults.setdefault(finding)
            else:
                self.notes.setdefault((finding.level, finding.text), finding)

    def add_error(self, error: EutecticError | OSError, where: str = "") -> None:
        """Add what an error says, if no fault says it yet."""
        text = str(error) if isinstance(error, EutecticError) else _said(error)
        if not any(fault.what == text for fault in self.faults):
            self.faults.setdefault(Fault("unreadable", text, where))

    def all(self) -> tuple[tuple[Fault, ...], tuple[Note, ...]]:
        """Return the faults, and the notes with warnings first."""
        return tuple(self.faults), tuple(
            sorted(self.notes.values(), key=lambda note: note.level != "warning")
        )


def _said(error: OSError) -> str:
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror or error}."


def counted(items: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return sums by name, the largest first."""
    sums: dict[str, int] = {}
    for name, count in items:
        sums[name] = sums.get(name, 0) + count
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
