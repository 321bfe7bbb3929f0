"""One tensor of the base: its treatment, and what the experts hold of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.index import TensorEntry
from eutectic.errors import Fault, Note
from eutectic.planning.inputs import Inputs
from eutectic.planning.treatment import Decision, decide
from eutectic.recipes.load import Source
from eutectic.recipes.schema import Recipe
from eutectic.types import Treatment

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class TensorPlan:
    """What will be done to one tensor of the base.

    Attributes:
        entry: the tensor in the base.
        decision: treatment, reason and layout.
        method: the method that merges it, or "copy".
        experts: the experts that take part.
        scale: α.
        dtype: of the output.
        compute: dtype of the arithmetic.
        seed_name: name that seeds random numbers; a tied tensor shares its partner's.
        tunable: α is the recipe's, which a search may choose, not that of a rule.
    """

    entry: TensorEntry
    decision: Decision
    method: str
    experts: tuple[str, ...]
    scale: float
    dtype: torch.dtype
    compute: torch.dtype
    seed_name: str
    tunable: bool = False

    @property
    def name(self) -> str:
        """The tensor's name in the base."""
        return self.entry.name

    @property
    def elements(self) -> int:
        """Number of entries."""
        return self.entry.numel


def plan_tensor(
    entry: TensorEntry,
    recipe: Recipe,
    inputs: Inputs,
    source: Source,
    tied: Mapping[str, str],
) -> TensorPlan | Fault:
    """Decide one tensor, or return its fault; the method follows in `with_method`."""
    rule_entry = replace(entry, name=tied.get(entry.name, entry.name))
    decision = decide(rule_entry, recipe.tensors, inputs.config)
    if isinstance(decision, Fault):
        return decision
    if entry.name in tied:
        decision = decision.because(Note("tied", (tied[entry.name],)))
    partner = tied.get(entry.name, entry.name)
    having = {
        n: e.entries[own]
        for n, e in inputs.experts.items()
        if (own := stored_name(e, entry.name, partner)) in e.entries
    }
    lacking = [n for n, e in inputs.experts.items() if n not in having and entry.name in e.missing]
    decision = _meet_experts(entry, decision, having, lacking, recipe, inputs, source)
    if isinstance(decision, Fault):
        return decision
    merged = decision.treatment not in (Treatment.COPY, Treatment.HEAD)
    if merged:
        fault = _dtype_fault(entry, having)
        if fault:
            return fault
    takes_part = tuple(inputs.experts)
    if recipe.missing == "available":
        takes_part = tuple(n for n in inputs.experts if n not in lacking)
    dtypes = [entry.dtype, *(e.dtype for e in having.values())]
    wide = torch.float64 in dtypes or recipe.dtype == "float64"
    floating = entry.dtype.is_floating_point
    return TensorPlan(
        entry=entry,
        decision=decision,
        method="copy",
        experts=takes_part,
        scale=1.0,
        dtype=getattr(torch, recipe.dtype) if recipe.dtype and floating else entry.dtype,
        compute=torch.float64 if wide else torch.float32,
        seed_name=tied.get(entry.name, entry.name),
    )


def stored_name(expert: Expert, name: str, partner: str) -> str:
    """Return under which name an expert stores a tensor: its tied partner's, if it dropped it."""
    return name if name in expert.entries else partner


def _meet_experts(
    entry: TensorEntry,
    decision: Decision,
    having: Mapping[str, TensorEntry],
    lacking: Sequence[str],
    recipe: Recipe,
    inputs: Inputs,
    source: Source,
) -> Decision | Fault:
    """Adjust a decision to what the experts hold of this tensor."""
    fixed = decision.treatment in (Treatment.COPY, Treatment.HEAD)
    shapes = {name: e.shape for name, e in having.items() if e.shape != entry.shape}
    if shapes and not fixed:
        listed = ", ".join(f"{n} {list(s)}" for n, s in shapes.items())
        if decision.treatment is Treatment.EMBEDDING:
            return Fault(
                "table_size",
                f"the base has {list(entry.shape)}, but {listed}. Tables of different size cannot "
                "be merged row by row; add a rule: treatment copy or head.",
                entry.name,
            )
        differ = Note("other_shape", tuple(shapes), {n: str(list(s)) for n, s in shapes.items()})
        return decision.because(differ, treatment=Treatment.HEAD)
    if shapes and decision.treatment is Treatment.COPY and not entry.dtype.is_floating_point:
        what = f"{entry.dtype} buffer of shape {list(entry.shape)} differs: {shapes}."
        return Fault("buffer", what, entry.name)
    if fixed:
        return decision
    if not having:
        absent = len(lacking) == len(inputs.experts)
        reason = Note("in_no_expert") if absent else Note("unchanged_by_adapters")
        return decision.because(reason, treatment=Treatment.COPY)
    if lacking and recipe.missing == "error":
        return Fault(
            "missing_tensor",
            f"missing from {', '.join(lacking)}.",
            entry.name,
            source.line("experts", lacking[0]),
            next="Choose missing: base (count it as unchanged) or missing: available.",
        )
    return decision


def _dtype_fault(entry: TensorEntry, having: Mapping[str, TensorEntry]) -> Fault | None:
    for owner, dtype in [("the base", entry.dtype), *((n, e.dtype) for n, e in having.items())]:
        if dtype not in _FLOATS:
            return Fault(
                "dtype",
                f"{owner} holds {dtype}, which cannot be merged.",
                entry.name,
                allowed="float16, bfloat16, float32, float64",
                next="Dequantise it first, or add a rule: treatment copy.",
            )
    return None
