"""What of a merged change a PEFT adapter can carry: thin factors, modules whole, or not at all.

Names are those of the model in memory, which PEFT's keys are made of. transformers is asked for
the model's modules where it is installed; else a file's names and a tensor's treatment tell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.meeting import meet_names
from eutectic.checkpoint.names import Alignment
from eutectic.conventions_ties import is_output_table, is_tied, is_token_table, output_name
from eutectic.errors import Fault, Note, RecipeError
from eutectic.methods import get_method
from eutectic.models.outline import Kind, Outline, outline_of
from eutectic.planning.adapter_stacks import Slot, stack_slots
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.recipes.schema import AdapterOptions
from eutectic.types import Treatment
from eutectic.words import counted, few

# factors: LoRA on a linear layer; table: LoRA on an embedding; whole: a module that is saved;
# bias: a linear layer's; stack: LoRA on a bare parameter that stacks a mixture's matrices; loose:
# nothing of an adapter's holds it
Form = Literal["factors", "table", "whole", "bias", "stack", "loose"]
THIN: tuple[Form, ...] = ("factors", "table", "stack")  # forms that hold a change as thin factors


@dataclass(frozen=True)
class Carried:
    """How an adapter holds one tensor's change. It can be pickled."""

    form: Form
    module: str  # its path in memory
    parameter: str  # its name there
    rank: int | None  # most directions; None: as many as the experts have, or as the energy asks
    energy: float | None
    vector: bool = False  # of one dimension: a norm's, or a bias
    dtype: torch.dtype = torch.float32  # of thin factors
    slot: Slot | None = None  # of a stack: where it lies in that


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter as the output of a merge."""

    options: AdapterOptions
    carried: Mapping[str, Carried]  # tensor of the plan -> how its change is held
    names: Mapping[str, str]  # tensor of the base -> its name in memory
    outline: Outline | None
    twins: Mapping[str, tuple[str, ...]]  # name in memory -> names of the same, not in the file
    head: str | None  # the expert whose heads are saved

    def is_doubtful(self, name: str) -> bool:
        """Tell whether a tensor is none that an adapter always holds, if it changes."""
        own = self.carried[name]
        return own.form == "loose" or own.vector

    def left_out(self, records: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Return the tensors whose change the adapter does not hold, by what merging them found."""
        changed = [n for n in self.carried if records.get(n, {}).get("adapter", {}).get("changed")]
        saved = self.options.others == "save"
        return [
            n
            for n in changed
            if self.carried[n].form == "loose" or (self.carried[n].vector and not saved)
        ]

    def refuse_uncarried(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse changes that an adapter does not hold, unless the recipe lets them go."""
        left = self.left_out(records)
        if not left or self.options.others == "drop":
            return
        loose = [n for n in left if self.carried[n].form == "loose"]
        vectors = [n for n in left if n not in loose]
        faults: list[Fault] = []
        if vectors:
            what = f"{len(vectors)} norms and biases change, which thin factors do not hold: "
            choose = (
                "Choose others: drop, which leaves them as they are in the base, or others: save, "
                "which peft loads (vLLM does not)."
            )
            faults.append(Fault("uncarried_vectors", what + few(vectors) + ".", next=choose))
        if loose:
            what = f"{len(loose)} tensors change that no module of PEFT's holds: {few(loose)}."
            choose = "Choose others: drop, which leaves them as they are in the base."
            faults.append(Fault("uncarried_tensors", what, next=choose))
        raise RecipeError(faults, "the adapter")


def thin_rank(planned: TensorPlan, inputs: Inputs) -> int:
    """Return how many directions the experts' thin factors have together."""
    total = 0
    for source in planned.experts:
        if source.tensor is not None:
            total += inputs.owner(source).inner_rank(source.tensor) or 0
    return max(1, min(total, *planned.shape[-2:]))


def held_rank(planned: TensorPlan, inputs: Inputs) -> int:
    """Return how many directions a merge of thin factors has at most.

    More than the factors where a fused matrix's parts are merged one by one into rows of their own.
    """
    rank = thin_rank(planned, inputs)
    own = [source.parameters for source in planned.experts if source.parameters is not None]
    shares_rows = map(get_method(planned.method).shares_rows, (planned.parameters, *own))
    if len(planned.layout.split) < 2 or all(shares_rows):
        return rank
    return sum(min(rank, *shape) for shape in planned.matrix_shapes)


def adapter_plan(
    tensors: Sequence[TensorPlan],
    heads: Mapping[str, tuple[TensorEntry, ...]],
    inputs: Inputs,
    options: AdapterOptions,
    dtype: torch.dtype = torch.float32,
) -> AdapterPlan | list[Fault]:
    """Decide how an adapter holds every merged tensor, or return what keeps it from that."""
    faults: list[Fault] = []
    if len(heads) > 1:
        what = f"an adapter has one head, and {few(list(heads))} have one each."
        faults.append(Fault("heads_in_adapter", what, next="Choose heads: base."))
    outline = outline_of(inputs.config)
    file_names = [t.name for t in tensors]
    names, alignment = _in_memory(file_names, outline, inputs)
    slots = stack_slots(tensors, names, (outline, alignment), inputs)
    held = inputs.base.entries
    twins = _twins(held, names, outline, inputs)
    carried: dict[str, Carried] = {}
    for planned in tensors:
        if planned.merged:
            own = _carried(planned, names, outline, options, dtype)
            slot = slots.get(planned.name)
            if slot is not None:
                module, _, parameter = slot.parameter.rpartition(".")
                own = replace(own, form="stack", module=module, parameter=parameter, slot=slot)
            carried[planned.name] = own
    faults += _not_thin(carried, inputs, options)
    faults += [] if faults else _beyond(tensors, carried, inputs, options)
    tables = [n for n, c in carried.items() if c.form == "table"]
    tied = next((n for n in tables if names[n] in twins), None)
    if tied is not None:
        what = (
            f"'{tied}' is tied to '{twins[names[tied]][0]}', and PEFT has no thin change of both."
        )
        faults.append(Fault("tied_table", what, next="Choose tables: save."))
    if faults:
        return faults
    return AdapterPlan(options, carried, names, outline, twins, next(iter(heads), None))


def rank_notes(tensors: Sequence[TensorPlan], adapter: AdapterPlan) -> list[Note]:
    """Return that a rank is asked for which no layer has, or that a method is not told it."""
    most = adapter.options.most
    untold = {
        t.method
        for t in tensors
        if t.merged and most is not None and getattr(t.parameters, "directions", most) is None
    }
    told = [Note("rank_untold", (name,), {"rank": most}) for name in sorted(untold)]
    held = [t for t in tensors if t.name in adapter.carried]
    sides = [min(t.shape[-2:]) for t in held if adapter.carried[t.name].form in THIN]
    if most is None or most <= max(sides, default=0) or not sides:
        return told
    return [*told, Note("rank_above_layers", (), {"rank": most, "side": max(sides)})]


def _not_thin(
    carried: Mapping[str, Carried], inputs: Inputs, options: AdapterOptions
) -> list[Fault]:
    """Refuse to keep everything of experts that have no thin factors."""
    if options.most is not None or options.share is not None:
        return []
    faults: list[Fault] = []
    for name, expert in inputs.experts.items():
        lacking = [
            n
            for n, c in carried.items()
            if c.form in THIN
            and (not expert.is_delta or (n in expert.entries and expert.inner_rank(n) is None))
        ]
        if lacking:
            what = (
                "its change has no thin factors, so that an adapter has to cut it "
                f"({counted(len(lacking), 'layer')}, such as {lacking[0]})."
            )
            where = f"expert '{name}'"
            choose = "Choose a rank, or rank: auto (--rank auto --energy 0.99)."
            faults.append(Fault("rank_needed", what, where, next=choose))
    return faults


def _beyond(
    tensors: Sequence[TensorPlan],
    carried: Mapping[str, Carried],
    inputs: Inputs,
    options: AdapterOptions,
) -> list[Fault]:
    """Refuse to keep everything of merges that have more directions than the experts' factors."""
    if options.most is not None or options.share is not None:
        return []
    found: dict[str, list[str]] = {}
    for planned in tensors:
        own = carried.get(planned.name)
        if own is None or own.form not in THIN:
            continue
        rank, side = thin_rank(planned, inputs), min(planned.shape[-2:])
        if get_method(planned.method).keeps_span and held_rank(planned, inputs) <= side:
            continue
        if 0 < rank < side:
            found.setdefault(planned.method, []).append(planned.name)
    choose = "Choose a rank, or rank: auto (--rank auto --energy 0.99)."
    return [
        Fault(
            "rank_needed",
            f"what {method} makes of adapters has more directions than their factors, so that an "
            f"adapter has to cut it ({counted(len(names), 'layer')}, such as {names[0]}).",
            "adapter",
            next=choose,
        )
        for method, names in found.items()
    ]


def _in_memory(
    names: Sequence[str], outline: Outline | None, inputs: Inputs
) -> tuple[Mapping[str, str], Alignment | None]:
    """Return what the model in memory calls the file's tensors; without a model, the same."""
    if outline is None:
        return {name: name for name in names}, None
    found, alignment = meet_names(outline.kinds, names, "the base", [inputs.config])
    held = inputs.base.entries
    met = {n: o for n, o in found.items() if n not in held or held[n].shape == outline.shapes[o]}
    return met, alignment


def _carried(
    planned: TensorPlan,
    names: Mapping[str, str],
    outline: Outline | None,
    options: AdapterOptions,
    dtype: torch.dtype,
) -> Carried:
    own = names.get(planned.name, "")
    module, _, parameter = own.rpartition(".")
    kind = _kind(planned, own, outline)
    vector = len(planned.shape) < 2
    form: Form = "loose"
    linear = kind in ("linear", "conv1d")
    table = _is_table(planned, own, outline)
    if not module:
        form = "loose"
    elif linear and vector and parameter == "bias":
        form = "bias"
    elif linear and parameter == "weight" and not (table and options.tables == "save"):
        form = "factors"
    elif kind == "embedding" and table and options.tables == "low_rank":
        form = "table"
    elif outline is None or module in outline.leaves:
        form = "whole"
    return Carried(form, module, parameter, options.most, options.share, vector, dtype)


def _kind(planned: TensorPlan, own: str, outline: Outline | None) -> Kind:
    if outline is not None:
        return outline.kinds.get(own, "other")
    if own.endswith(".bias"):
        return "other"
    if len(planned.shape) == 2 and own.endswith(".weight"):
        if planned.treatment is Treatment.EMBEDDING:
            return "embedding"
        return "conv1d" if planned.layout.transpose else "linear"
    return "other"


def _is_table(planned: TensorPlan, own: str, outline: Outline | None) -> bool:
    """Tell whether a tensor is a table of tokens, read or written, or another lookup table."""
    if outline is not None and own in outline.tables:
        return True
    table = is_token_table(planned.name) or is_output_table(planned.name)
    return planned.treatment is Treatment.EMBEDDING or (table and outline is None)


def _twins(
    held: Mapping[str, TensorEntry],
    names: Mapping[str, str],
    outline: Outline | None,
    inputs: Inputs,
) -> Mapping[str, tuple[str, ...]]:
    """Return under which further names a model has a table that its file holds once."""
    if outline is not None:
        own = set(names.values())
        found = {n: tuple(o for o in outline.twins.get(n, ()) if o not in own) for n in own}
        return {n: others for n, others in found.items() if others}
    table = next((n for n in held if is_token_table(n)), None)
    known = isinstance(inputs.config.get("tie_word_embeddings"), bool)
    if table is None or not (known and is_tied(inputs.config)):
        return {}
    tokens = held[table].shape[0]
    biases = (n for n, e in held.items() if e.shape == (tokens,))
    written = output_name(table, biases, held, inputs.config)
    return {} if written in names.values() else {table: (written,)}
