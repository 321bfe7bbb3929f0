"""Where every checkpoint keeps tied tensors, and which ties the output no longer has.

A checkpoint that holds a tied tensor under one of its names has it under all; one that holds it
with different values has untied it, and so has an adapter that trains the output layer, or saves
one of the modules whole: under the other names it computes with the base's. Where an expert unties
what the base ties, the output holds both, and its configuration says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eutectic import conventions_ties as habits
from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.reader import TensorSource
from eutectic.errors import Fault, Note
from eutectic.planning.shared_modules import Stored, same_values, shared_in
from eutectic.planning.tied_groups import (
    Group,
    TiedModel,
    groups_of,
    has,
    is_output,
    join,
    model_of,
    same_in,
)


@dataclass(frozen=True)
class Ties:
    """Which tensors are one under several names, and where every checkpoint keeps it."""

    partner: Mapping[str, str] = field(default_factory=dict[str, str])  # copy -> whose rules it has
    # tensor of the output that the base's file leaves out -> the tensor that it is in the base
    added: Mapping[str, str] = field(default_factory=dict[str, str])
    apart: frozenset[str] = frozenset()  # tied in the base, and no longer in the output
    # owner -> tensor of the output -> its name in that owner's checkpoint
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    # expert -> tensors that the base's file lacks, and that are no heads but members of a tie
    explained: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])
    tied: bool | None = None  # what the output's configuration has to say; None: as it does
    notes: tuple[Note, ...] = ()
    faults: tuple[Fault, ...] = ()

    def source(self, owner: str, expert: Expert, name: str) -> str | None:
        """Return the name under which an expert keeps a tensor, None where it lacks it.

        An adapter that does not act on the tensor still has it: its change there is zero.
        """
        held = self.sources.get(owner)
        if held and (own := held.get(name)) is not None:
            return own
        return name if expert.is_delta or name in expert.entries else None


def find_ties(base: TensorSource, config: Mapping[str, Any], experts: Mapping[str, Expert]) -> Ties:
    """Return the ties of a base, and where every expert keeps what is tied.

    Tensors that may be copies of each other are read, to the end where they are.
    """
    model = model_of(base, config)
    groups = groups_of(model)
    shared = shared_in(base, experts.values(), [group.held for group in groups])
    groups += [Group(base.entries[names[0]], names) for names in shared]
    explained = {name: join(model, groups, expert) for name, expert in experts.items()}
    faults: list[Fault] = []
    for owner, expert in experts.items():
        faults += [_of_another_base(owner, name) for name in expert.tied.keys() - explained[owner]]
        for group in groups:
            faults += _locate(model, groups, group, owner, expert)
    apart = {name: group for group in groups for name in group.apart}
    opens = bool(model.tied) and any(group.is_used_as_table for group in apart.values())
    added = {
        name: group.held[0]
        for group in groups
        for name in group.others
        if name in apart or (opens and _is_asked_for(name, group, apart))
    }
    sources: dict[str, dict[str, str]] = {}
    for group in groups:
        for owner, own in group.sources.items():
            kept = {n: s for n, s in own.items() if n in added or n in group.held}
            sources.setdefault(owner, {}).update(kept)
    tied, notes = _stated(model, groups, added, opens)
    return Ties(
        partner={n: g.held[0] for g in groups for n in g.held[1:]} | added,
        added=added,
        apart=frozenset(apart),
        sources=sources,
        explained=explained,
        tied=tied,
        notes=tuple(notes),
        faults=tuple(faults),
    )


def _locate(
    model: TiedModel, groups: Sequence[Group], group: Group, owner: str, expert: Expert
) -> list[Fault]:
    """Note under which names an expert keeps a tied tensor, and under which it differs."""
    held = [n for n in group.names if has(expert, n, group.entry)]
    # Those in another shape stay what they are, and are refused or kept as heads.
    other = [n for n in group.names if n not in held and (n in expert.entries or n in expert.extra)]
    if other and not held:
        return []
    sources = group.sources.setdefault(owner, {})
    faults: list[Fault] = []
    for name in group.names:
        if name in other:
            continue
        if expert.is_delta:
            sources[name] = _changed_as(model, expert, group, held, name)
        elif held:
            own = _kept_as(expert, held, name)
            if own is not None:
                sources[name] = own
            elif name in group.held:
                faults.append(_undecided(owner, held, name))
        elif (own := _kept_elsewhere(model, groups, group, expert)) is not None:
            sources[name] = own
    first = sources.get(group.held[0])
    for name, own in sources.items():
        if first is not None and own != first and not _alike(model, expert, group, (first, own)):
            group.apart.setdefault(name, []).append(owner)
    return faults


def _kept_as(expert: Expert, held: Sequence[str], name: str) -> str | None:
    """Return under which of the names that a full expert holds it keeps the tensor of another.

    Where they differ among themselves, an input is kept as the inputs are, an output as the
    outputs, or either as the table that stands for all. None where that leaves several.
    """
    if name in held:
        return name
    outputs = [n for n in held if is_output(n)]
    inputs = [n for n in held if n not in outputs]
    like = (outputs or inputs) if is_output(name) else (inputs or outputs)
    shared = [n for n in like if habits.is_shared_table(n)]
    chosen = (shared or like)[0]
    return chosen if shared or all(same_in(expert, chosen, n) for n in like) else None


def _of_another_base(owner: str, name: str) -> Fault:
    what = (
        f"the adapter '{owner}' acts on it, but the base has no such tensor, nor does its "
        "configuration say that it is tied to another."
    )
    return Fault("another_base", what, name, next="Was it trained on another base?")


def _undecided(owner: str, held: Sequence[str], name: str) -> Fault:
    what = (
        f"expert '{owner}' lacks it, and holds {', '.join(held)} with different values, to each of "
        "which it may be tied."
    )
    return Fault("copies_differ", what, name, next="Save the expert with all of them.")


def _kept_elsewhere(
    model: TiedModel, groups: Sequence[Group], group: Group, expert: Expert
) -> str | None:
    """Return where an expert that ties two tensors of the base keeps the one that it lacks."""
    found: list[str] = []
    for other in groups:
        held = [n for n in other.names if has(expert, n, group.entry)]
        if other is not group and held and _ties(model, expert, group, other):
            found.append(held[0])
    return found[0] if len(found) == 1 else None


def _ties(model: TiedModel, expert: Expert, group: Group, other: Group) -> bool:
    """Tell whether an expert has one tensor where the base has two."""
    names = model.base.entries
    tied = habits.is_tied(expert.config) is True
    if group.is_bias:
        return tied and other.held[0] in habits.bias_names(group.held[0])
    for one, two in ((group, other), (other, group)):
        if any(n in two.held for t in one.tables for n in habits.input_names(t, names)):
            return True
        if one.tables and any(map(is_output, two.held)):
            return tied
    return False


def _changed_as(
    model: TiedModel, expert: Expert, group: Group, held: Sequence[str], name: str
) -> str:
    """Return under which name an adapter changes a tied tensor; its own where it does not.

    A layer computes with its own change. Who has none shares that of the table, for a merge of LoRA
    factors changes the weight itself, in peft's `merge_and_unload` too; a table that stands for
    others is no layer, nor is a bias with two names, and peft keeps layers tied where it was told
    to.
    """
    if held and expert.config.get("ensure_weight_tying"):
        return held[0]
    if name in held or not held:
        return name
    tables = [n for n in held if expert.acts_on(n) and not is_output(n)]
    if len(tables) == 1:
        return tables[0]
    if group.is_bias or not model.extends or model.tied is None:
        return held[0]
    return next((n for n in held if habits.is_shared_table(n)), name)


def _alike(model: TiedModel, expert: Expert, group: Group, names: tuple[str, str]) -> bool:
    """Tell whether an expert has the same values under two names of a group."""
    if not expert.is_delta:
        return same_in(expert, *names)
    acting = [n for n in names if _acts(model, expert, group, n)]
    return not acting or (len(acting) == 2 and same_in(expert, *names))


def _acts(model: TiedModel, expert: Expert, group: Group, name: str) -> bool:
    """Tell whether an adapter changes a tensor at all, or only brings a copy of the base's."""
    if name in expert.factored and all(bool(f.any()) for f in expert.pair(name)):
        return True
    if name in expert.changes:
        return not expert.changes[name].zero
    if name not in expert.stored:
        return False
    own = Stored(expert.source.read, expert.stored[name].name)
    return not same_values(own, Stored(model.base.read, group.held[0]), group.entry.numel)


def _is_asked_for(name: str, group: Group, apart: Mapping[str, Group]) -> bool:
    """Tell whether a model whose configuration ties nothing asks its file for a name."""
    if not group.is_bias:
        return any(n in apart for n in group.names)
    weight = habits.bias_names(name)[1].removesuffix("bias") + "weight"
    return any(weight in other.names for other in apart.values())


def _stated(
    model: TiedModel, groups: Sequence[Group], added: Mapping[str, str], opens: bool
) -> tuple[bool | None, list[Note]]:
    """Return what the output's configuration must say of ties, and what is to be told."""
    kind = str(model.config.get("model_type"))
    notes: list[Note] = []
    for group in groups:
        if group.apart and group.is_used_as_table and model.tied is not False:
            owners = dict.fromkeys(owner for own in group.apart.values() for owner in own)
            told = {"partner": group.held[0], "experts": ", ".join(f"'{o}'" for o in owners)}
            notes.append(Note("untied", tuple(group.apart), told))
    if opens:
        if habits.scales_apart(kind):
            notes.append(Note("scale_apart", (kind,), level="warning"))
        if habits.ties_with_scale(kind):
            return None, [*notes, Note("tie_kept", (kind,), level="warning")]
        return False, notes
    pairs = _differing(groups)
    if pairs and model.tied and not habits.ties_by_file(kind):
        return False, [*notes, Note("base_untied", pairs[0], level="warning")]
    alone = any(not group.is_bias and any(map(is_output, group.others)) for group in groups)
    return (True if alone and model.tied and not added else None), notes


def _differing(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Return tables and output layers of a base that might be one, and differ."""
    outputs: dict[tuple[int, ...], str] = {}  # shape -> the first output layer
    for group in groups:
        if all(map(is_output, group.held)):
            outputs.setdefault(group.entry.shape, group.held[0])
    return [
        (group.held[0], outputs[group.entry.shape])
        for group in groups
        if group.tables and group.entry.shape in outputs and not any(map(is_output, group.held))
    ]
