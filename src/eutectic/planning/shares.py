"""Which share of the experts' numbers a plan merges, keeps as heads, and leaves.

By headers: which numbers a fine-tune changed is known only when they are read, so all that it may
have changed count. Of a full checkpoint these are the numbers of all its tensors, of an adapter
those of the tensors on which it acts. Buffers, integers that every expert must hold alike, empty
tensors and copies of a table that counts already are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.index import TensorEntry
from eutectic.conventions_heads import is_buffer
from eutectic.planning.inputs import MergeRequest
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.types import Treatment


@dataclass(frozen=True)
class ExpertShare:
    """How many numbers of one expert a plan merges, keeps and leaves."""

    merged: int
    kept: int  # in `experts/<name>/`, as heads
    left: int  # neither: the output has the base's values there
    left_tensors: tuple[str, ...]

    @property
    def numbers(self) -> int:
        """All that the expert may have changed."""
        return self.merged + self.kept + self.left


@dataclass(frozen=True)
class Shares:
    """The same of all experts together, and of each."""

    experts: Mapping[str, ExpertShare]
    base: int  # numbers of the base
    base_alone: int  # of them, those that no expert has

    @property
    def record(self) -> dict[str, Any]:
        """The shares as JSON has them: parts of one, and the count that they are parts of."""
        every = list(self.experts.values())
        whole = _parts(
            sum(e.merged for e in every), sum(e.kept for e in every), sum(e.left for e in every)
        )
        return {
            **whole,
            "base_alone": self.base_alone / max(self.base, 1),
            "experts": {n: _parts(e.merged, e.kept, e.left) for n, e in self.experts.items()},
        }


def _parts(merged: int, kept: int, left: int) -> dict[str, Any]:
    numbers = merged + kept + left
    whole = max(numbers, 1)
    return {
        "numbers": numbers,
        "merged": merged / whole,
        "kept": kept / whole,
        "left": left / whole,
    }


def shares_of(
    tensors: Sequence[TensorPlan],
    heads: Mapping[str, Sequence[TensorEntry]],
    unmatched: Mapping[str, Sequence[str]],
    request: MergeRequest,
) -> Shares:
    """Return the shares of a plan. Tensors that do not meet count as left, kept or not."""
    base, ties = request.inputs.base.entries, request.ties
    planned = {t.name: t for t in tensors}
    elsewhere = {s.owner for t in tensors for s in t.experts if s.tensor not in (None, t.name)}
    alone = [t for t in tensors if any(r.kind == "in_no_expert" for r in t.reason)]
    return Shares(
        {
            name: _share_of(
                expert,
                planned if name not in elsewhere else planned | _held_as(name, tensors),
                {e.name for e in heads.get(name, ())} - {*unmatched.get(name, ())},
                ties.explained[name],
            )
            for name, expert in request.inputs.experts.items()
        },
        sum(entry.numel for entry in base.values()),
        sum(t.elements for t in alone),
    )


def _held_as(owner: str, tensors: Sequence[TensorPlan]) -> dict[str, TensorPlan]:
    """Return an expert's own names -> the tensors that it takes part in."""
    return {s.tensor or "": t for t in tensors for s in t.experts if s.owner == owner}


def _share_of(
    expert: Expert, planned: Mapping[str, TensorPlan], kept: set[str], copies: Collection[str]
) -> ExpertShare:
    counts = dict.fromkeys(("merged", "kept", "left"), 0)
    left: list[str] = []
    for name, entry in [*expert.entries.items(), *expert.extra.items()]:
        own = planned.get(name)
        if own is not None and own.merged:
            counts["merged"] += entry.numel
        elif _is_constant(name, entry, own) or name in copies:
            continue
        elif name in kept:
            counts["kept"] += entry.numel
        else:
            counts["left"] += entry.numel
            left.append(name)
    return ExpertShare(**counts, left_tensors=tuple(left))


def _is_constant(name: str, entry: TensorEntry, planned: TensorPlan | None) -> bool:
    """Tell whether a tensor holds nothing that training changes."""
    agrees = planned is not None and planned.must_agree and planned.treatment is Treatment.COPY
    return agrees or not entry.numel or is_buffer(name, len(entry.shape))
