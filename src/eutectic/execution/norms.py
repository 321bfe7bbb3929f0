"""How large a merged change is against the experts' own: a guard against merges that explode.

Measured in passing. Matrices that a method merges as such are measured whole; what is merged in
chunks is measured on the first entries of a few, which stand for all.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eutectic.errors import Note
from eutectic.execution.tensor_values import read_base
from eutectic.linalg.gram import gram
from eutectic.linalg.lowrank import LowRankStack
from eutectic.methods import get_method
from eutectic.planning.inputs import Inputs
from eutectic.planning.plan import Plan
from eutectic.planning.tensor_plan import TensorPlan, chunk_entries

# matrix of a tensor ("" for the whole) -> ‖Δ‖² before α, ‖W₀‖², and ‖Δ_t‖² of its experts in order
Squares = dict[str, list[float]]

SAMPLE = 1 << 13  # entries of a chunk that are measured
CHUNKS = 4  # of a tensor that are measured, about
BOUND = 3.0  # times the experts' mean
KIN = 10.0  # times the median of the other experts
SHOWN = 4
ROW = 1024  # entries that are summed in float32
SOUND = 1e-18, 1e30  # squares that float32 holds, with those of the parts that matter
CANCELLED = 1e-3  # of ‖L‖²‖R‖²: below it a product's square in float32 has not four digits
BEARABLE = 1.25  # times the experts' mean, of language models at a scale that nobody chose


def add_chunk(
    squares: Squares,
    planned: TensorPlan,
    inputs: Inputs,
    seen: tuple[int, Tensor, Tensor | None],
    merged: Tensor,
    in_weights: bool,
) -> None:
    """Add what one chunk says: its flat start, the `[T, n]` that a method saw, and the base.

    `in_weights`: stack and result hold weights instead of deltas.
    """
    if planned.base is None:  # nothing is subtracted, so that there is no change to measure
        return
    start, stack, base = seen
    chunk = chunk_entries(planned)
    every = max(1, planned.elements // (chunk * CHUNKS))
    count = every * merged.numel()
    taken = min(merged.numel(), SAMPLE)
    if taken == 0 or (start // chunk) % every:
        return
    own = read_base(planned, inputs, start, start + taken) if base is None else base[:taken]
    deltas, merged = stack[:, :taken], merged[:taken]
    if in_weights:
        deltas, merged = deltas - own, merged - own
    found = [
        float(torch.linalg.vector_norm(merged)),
        float(torch.linalg.vector_norm(own)),
        *torch.linalg.vector_norm(deltas, dim=1).tolist(),
    ]
    scale = count / taken
    held = squares.setdefault("", [0.0] * len(found))
    for place, norm in enumerate(found):
        held[place] += scale * norm * norm


def squares_of(deltas: Tensor | LowRankStack, base: Tensor | None, merged: Tensor) -> list[float]:
    """Return the squares of one matrix, its deltas given as `[T, *shape]` or as thin factors."""
    if isinstance(deltas, LowRankStack):
        experts = [_square_of_product(p.left, p.right) for p in deltas]
    else:
        experts = [square(delta) for delta in deltas]
    return [square(merged), 0.0 if base is None else square(base), *experts]


def square(values: Tensor) -> float:
    """Return ‖x‖², rows of it in float32 where its range holds that, their sum in float64."""
    if values.dtype == torch.float32 and values.numel() % ROW == 0:
        rows = torch.linalg.vector_norm(values.reshape(-1, ROW), dim=1)
        found = float(rows.double().square().sum())
        if SOUND[0] <= found <= SOUND[1]:
            return found
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _square_of_product(left: Tensor, right: Tensor) -> float:
    """Return ‖LR‖² = ⟨LᵀL, RRᵀ⟩ from two small Grams, in float32 where nothing cancels."""
    if left.dtype == right.dtype == torch.float32 and left.shape[1]:
        sides = gram(left, left.dtype).double(), gram(right.mT, right.dtype).double()
        most = float(sides[0].trace() * sides[1].trace())
        found = float((sides[0] * sides[1]).sum())
        if SOUND[0] <= most <= SOUND[1] and found >= CANCELLED * most:
            return found
    wide = left.double(), right.double()
    return max(0.0, float(((wide[0].mT @ wide[0]) * (wide[1] @ wide[1].mT)).sum()))


def with_layer_factors(
    squares: Squares, factors: Mapping[str, float], named: Mapping[str, str]
) -> Squares:
    """Return the squares with each matrix's factor besides α; `named` is label -> matrix."""
    return {
        label: [own[0] * factors.get(named.get(label, ""), 1.0) ** 2, *own[1:]]
        for label, own in squares.items()
    }


@dataclass(frozen=True)
class Growth:
    """One matrix: the norm of its merged change, with α, and what it is measured against."""

    name: str
    merged: float
    mean: float  # of the experts that change it
    experts: int  # how many do

    @property
    def ratio(self) -> float:
        """α‖Δ‖ over the experts' mean."""
        return self.merged / self.mean

    @property
    def is_large(self) -> bool:
        """Whether it is beyond the bound for so many experts."""
        return self.ratio > bound(self.experts)


def bound(experts: int) -> float:
    """Return above how many times the experts' mean a change is told.

    That is 3, or √T for many: so large is the sum of T changes that have nothing in common.
    """
    return max(BOUND, math.sqrt(experts))


def measured(plan: Plan, squares: Mapping[str, Squares]) -> dict[str, Any]:
    """Return the norms of a merge: of the whole, of the experts, and the largest matrices.

    Empty where nothing was measured. Norms have four digits.
    """
    total, base = 0.0, 0.0
    experts: dict[str, float] = {}
    layers: list[Growth] = []
    vanished: list[str] = []
    for planned in plan.tensors:
        sampled = planned.merged and get_method(planned.method).elementwise
        for label, (merged, held, *own) in squares.get(planned.name, {}).items():
            if not all(map(math.isfinite, (merged, held, *own))):
                continue
            merged *= planned.scale**2
            total, base = total + merged, base + held
            for source, square in zip(planned.experts, own, strict=True):
                experts[source.owner] = experts.get(source.owner, 0.0) + square
            if len(planned.shape) > 1 and (one := growth_of(planned.name + label, merged, own)):
                layers.append(one)
                if planned.scale and not (merged or sampled):
                    vanished.append(one.name)
    whole = growth_of("", total, list(experts.values()))
    if not experts or not math.isfinite(total + base):
        return {}
    return {
        "merged": _digits(math.sqrt(total)),
        "base": _digits(math.sqrt(base)),
        "experts": {name: _digits(math.sqrt(square)) for name, square in experts.items()},
        **summary_of(whole, layers),
        **({"vanished": len(vanished), "such_as": vanished[:SHOWN]} if vanished else {}),
    }


def summary_of(whole: Growth | None, layers: Sequence[Growth]) -> dict[str, Any]:
    """Return the ratio of the whole, and which matrices are beyond the bound."""
    large = sorted((g for g in layers if g.is_large), key=lambda g: g.ratio, reverse=True)
    return {
        "ratio": None if whole is None else _digits(whole.ratio),
        "bound": _digits(bound(0 if whole is None else whole.experts)),
        "matrices": len(layers),
        "above": len(large),
        "largest": {g.name: _digits(g.ratio) for g in large[:SHOWN]},
    }


def explosion(found: Mapping[str, Any], model: str = "") -> list[Note]:
    """Return a warning where the change of a merged model, or of matrices of it, has exploded."""
    if not found["above"] and (found["ratio"] is None or found["ratio"] <= found["bound"]):
        return []
    told = {key: found[key] for key in ("ratio", "bound", "above", "matrices", "largest")}
    told |= {"model": model} if model else {}
    return [Note("exploded", tuple(found["largest"]), told, "warning")]


def growth_of(name: str, merged: float, experts: Sequence[float]) -> Growth | None:
    """Return how large a change is, from squared norms; None where no expert changes anything."""
    changing = [math.sqrt(square) for square in experts if square > 0]
    if not changing:
        return None
    return Growth(name, math.sqrt(merged), statistics.fmean(changing), len(changing))


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def norm_notes(norms: Mapping[str, Any]) -> list[Note]:
    """Return warnings of a change that exploded, and of experts that are no kin of the others."""
    if not norms:
        return []
    notes = explosion(norms)
    experts, base = norms["experts"], norms["base"]
    if count := norms.get("vanished"):
        notes.append(Note("vanished", tuple(norms["such_as"]), {"count": count}, "warning"))
    for name, norm in experts.items():
        others = [own for other, own in experts.items() if other != name and own > 0]
        kin = statistics.median(others) if others else 0.0
        if norm == 0:
            notes.append(Note("changes_nothing", (name,), level="warning"))
        elif (base and norm > base) or (kin and norm > KIN * kin):
            told = {
                "share": _digits(norm / base) if base and norm > base else None,
                "kin": _digits(norm / kin) if kin and norm > KIN * kin else None,
            }
            notes.append(Note("unrelated", (name,), told, "warning"))
    return notes


# what the norms say -> what a plan may have said of the same expert before
_SAID = {"changes_nothing": "same_as_base", "unrelated": "no_kin"}


def new_norm_notes(plan: Plan, norms: Mapping[str, Any]) -> list[Note]:
    """Return the warnings of `norm_notes` that a plan's notes have not told."""
    known = {(note.kind, note.subject) for note in plan.notes}
    told = [n for n in norm_notes(norms) if (_SAID.get(n.kind, ""), n.subject) not in known]
    trimmed = sum(n.numbers["count"] for n in plan.notes if n.kind == "trimmed_away")
    told = [n for n in told if n.kind != "vanished" or n.numbers["count"] > trimmed]
    ratio = norms.get("ratio") if norms else None
    if plan.request.default_for_texts and ratio is not None and ratio > BEARABLE:
        numbers = {
            "method": plan.method.name,
            "scale": plan.scale,
            "ratio": ratio,
            "norm": plan.scale / ratio,
        }
        told.append(Note("default_for_pictures", (), numbers, "warning"))
    return told
