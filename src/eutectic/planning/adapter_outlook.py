"""What an adapter will hold of a merge, as far as headers tell: for plans, before any merge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eutectic.conventions_heads import is_buffer
from eutectic.methods import get_method
from eutectic.planning.adapter_plan import THIN, AdapterPlan, held_rank
from eutectic.planning.inputs import Inputs
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.words import counted, few

if TYPE_CHECKING:
    from eutectic.planning.plan import Plan

ENERGY = "energy"  # instead of a rank, where it alone decides


def adapter_outlook(plan: Plan, inputs: Inputs) -> dict[str, Any]:
    """Return which layers an adapter holds and of which rank, what it saves whole, and what not.

    Counted is what some expert may change: of an adapter what it acts on, of a checkpoint all.
    `ranks` are bounds; "energy" is what it decides. `not_held` are tensors that no factors
    hold, `others` says what becomes of them where they change; of `loose` ones no module holds.
    """
    adapter = plan.adapter
    assert adapter is not None
    options = adapter.options
    changing = [t for t in plan.merged if t.name in adapter.carried and _may_change(t, inputs)]
    form = {t.name: adapter.carried[t.name] for t in changing}
    thin = [t for t in changing if form[t.name].form in THIN]
    ranks = Counter(_rank(t, adapter, inputs) for t in thin)
    saved = {own.module for own in form.values() if own.form == "whole" and not own.vector}
    loose = [n for n, own in form.items() if own.form == "loose"]
    vectors = [n for n, own in form.items() if own.vector and n not in loose]
    if options.others == "save":
        saved |= {form[n].module for n in vectors if form[n].form == "whole"}
    if adapter.head is not None:
        heads = (h for h in plan.heads[adapter.head] if not is_buffer(h.name, len(h.shape)))
        saved |= {adapter.names.get(h.name, h.name).rpartition(".")[0] for h in heads} - {""}
    return {
        "layers": len(thin),
        "ranks": {str(r or ENERGY): ranks[r] for r in sorted(ranks, key=lambda r: r or 0)},
        "energy": options.share,
        "compress": options.compress,
        "balance": options.balance,
        "modules_to_save": sorted(saved),
        "not_held": [] if options.others == "save" else vectors,
        "loose": loose,
        "others": options.others,
        "certain": all(inputs.owner(s).is_delta for t in plan.merged for s in t.experts),
    }


def adapter_bytes(plan: Plan, inputs: Inputs) -> dict[str, int]:
    """Return how many bytes of each tensor an adapter holds: bounds, as its ranks are.

    Where only the energy tells a rank, as many directions as the layer has. Of a head, those of
    the expert whose head it is.
    """
    adapter = plan.adapter
    assert adapter is not None
    found: dict[str, int] = {}
    for planned in plan.merged:
        own = adapter.carried.get(planned.name)
        if own is None or not _may_change(planned, inputs):
            continue
        if own.form in THIN:
            out, width = planned.shape[-2:]
            rank = min(_rank(planned, adapter, inputs) or out, out, width)
            found[planned.name] = planned.blocks[0] * rank * (out + width) * own.dtype.itemsize
        elif own.form == "whole" and not own.vector:
            found[planned.name] = planned.elements * planned.dtype.itemsize
        elif own.form != "loose" and adapter.options.others == "save":
            found[planned.name] = planned.elements * planned.dtype.itemsize
    if adapter.head is not None:
        heads = plan.heads[adapter.head]
        found |= {h.name: h.nbytes for h in heads if not is_buffer(h.name, len(h.shape))}
    return found


def outlook_in_words(held: Mapping[str, Any]) -> list[str]:
    """Return what an adapter will hold, in sentences."""
    ranks: Mapping[str, int] = held["ranks"]
    known = {int(rank): count for rank, count in ranks.items() if rank != ENERGY}
    of_rank = ""
    if known:
        low, high = min(known), max(known)
        of_rank = f" of rank {high}" if low == high else f" of ranks {low} to {high}"
        of_rank += " at most" if held["energy"] is not None else ""
    elif ranks:
        of_rank = f" of the ranks that keep {held['energy']:g} of each change"
    before = ", to which the experts are brought before" if held["compress"] == "before" else ""
    if held["balance"]:
        before += f" (balance {held['balance']:g})"
    said = [f"thin factors of {counted(held['layers'], 'layer')}{of_rank}{before}"]
    if held["modules_to_save"]:
        said.append(f"saved whole (modules_to_save): {few(held['modules_to_save'])}")
    if held["not_held"] or held["loose"]:
        said.append(_left(held))
    return said


def _left(held: Mapping[str, Any]) -> str:
    """Say what is not held, and what becomes of it."""
    parts: list[str] = []
    if vectors := held["not_held"]:
        parts.append(
            f"{counted(len(vectors), 'norm or bias', 'norms and biases')} ({few(vectors)})"
        )
    if loose := held["loose"]:
        parts.append(f"{counted(len(loose), 'tensor')} of no module of PEFT's ({few(loose)})")
    one = len(held["not_held"]) + len(held["loose"]) == 1
    verb = "is" if one else "are"
    fate = f"left as in the base (others: {held['others']})"
    if held["others"] == "error" or (held["loose"] and held["others"] == "save"):
        fate = "refused (others: drop leaves them as in the base"
        fate += ", others: save keeps norms and biases beside)" if held["not_held"] else ")"
    when = "" if held["certain"] else (" if it changes" if one else " if they change")
    return f"not held: {' and '.join(parts)}, which {verb} {fate}{when}"


def _may_change(planned: TensorPlan, inputs: Inputs) -> bool:
    for source in planned.experts:
        owner = inputs.owner(source)
        if source.tensor is not None and (not owner.is_delta or source.tensor in owner.entries):
            return True
    return False


def _rank(planned: TensorPlan, adapter: AdapterPlan, inputs: Inputs) -> int | None:
    """Return the most directions of a layer; None where only the energy tells."""
    options, side = adapter.options, min(planned.shape[-2:])
    if options.most is None and options.share is not None:
        return None
    if options.most is None:
        return min(held_rank(planned, inputs), side)
    most = min(options.most, side)
    own = [(inputs.owner(s), s.tensor) for s in planned.experts if s.tensor is not None]
    acting = [(e, name) for e, name in own if not e.is_delta or name in e.entries]
    known = all(e.inner_rank(name) is not None for e, name in acting)
    spans = known and get_method(planned.method).keeps_span
    return min(most, held_rank(planned, inputs)) if spans else most
