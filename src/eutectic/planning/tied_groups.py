"""Tied tensors of a model: groups of names for one tensor, of which a file holds any.

Copies are recognised by their names and their values; names that the base's file leaves out, by the
habits of transformers and by what the experts hold.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from eutectic import conventions_ties as habits
from eutectic.checkpoint.changes import TokenRows
from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.reader import TensorSource
from eutectic.conventions import is_output_vocabulary, may_be_vocabulary
from eutectic.planning.shared_modules import Stored, content_keys, repeated, same_values


@dataclass(frozen=True)
class TiedModel:
    """What a base and its configuration say of ties."""

    base: TensorSource
    config: Mapping[str, Any]
    tied: bool | None  # its output layer is its table of tokens; None where nothing is known
    extends: bool  # it has an output layer, which is one of its tables where the file holds none


@dataclass
class Group:
    """One tensor of a model and all its names."""

    entry: TensorEntry  # of the base's first
    held: list[str]  # the base's file has it under these names, the first of which gives the rules
    others: list[str] = field(default_factory=list[str])  # names that the base's file leaves out
    # owner -> name -> its name in that owner's checkpoint
    sources: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    # name -> owners in which its values are not those under the first name
    apart: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    @property
    def names(self) -> list[str]:
        """All names, the base's first."""
        return [*self.held, *self.others]

    @property
    def is_bias(self) -> bool:
        """Whether it is the bias of a head, not a table."""
        return len(self.entry.shape) == 1

    @property
    def tables(self) -> list[str]:
        """The base's names for a table of the tokens that are read."""
        return [n for n in self.held if habits.is_token_table(n)]

    @property
    def is_used_as_table(self) -> bool:
        """Whether the base has it as a table of tokens or as its output layer."""
        return bool(self.tables) or any(map(is_output, self.held))


@lru_cache(maxsize=1 << 16)
def is_output(name: str) -> bool:
    """Tell whether a tensor may be an output layer over the vocabulary, going by its name."""
    return is_output_vocabulary(name) or habits.is_output_table(name)


def model_of(base: TensorSource, config: Mapping[str, Any]) -> TiedModel:
    """Return what a base says of ties."""
    tied = habits.is_tied(config)
    return TiedModel(base, config, tied, tied is not False and habits.has_output_layer(config))


def groups_of(model: TiedModel) -> list[Group]:
    """Return the tied tensors of a base, with the names that it has by habit beside its file's."""
    names = model.base.entries
    groups: list[Group] = []
    written = {e.shape for n, e in names.items() if len(e.shape) == 2 and is_output(n)}
    biases: dict[int, list[str]] = {}
    for name, entry in names.items():
        if len(entry.shape) == 1:
            biases.setdefault(entry.shape[0], []).append(name)
    for held in equal_tensors(model.base):
        group = Group(names[held[0]], held)
        if group.is_bias:
            group.others = [n for n in habits.bias_names(held[0]) if n not in names]
        else:
            siblings = (n for t in group.tables for n in habits.input_names(t, names))
            group.others = [n for n in dict.fromkeys(siblings) if n not in names]
            if group.entry.shape not in written:
                group.others += _output_of(group, model, biases.get(group.entry.shape[0], ()))
        groups.append(group)
    return groups


def equal_tensors(base: TensorSource) -> list[list[str]]:
    """Return the names of tensors that are equal in a base, and of single ones that may be tied.

    Tables first, in the order of the file, then output layers, then biases of heads.
    """
    entries = base.entries
    matrices = [e for e in entries.values() if len(e.shape) == 2]
    tables = [e for e in matrices if may_be_vocabulary(e.name)]
    outputs = [e for e in matrices if is_output(e.name) and not may_be_vocabulary(e.name)]
    groups: list[list[str]] = []
    equal_to: dict[Hashable, list[str]] = {}  # content -> the group of tables that have it
    keys = content_keys(base.read, (*tables, *outputs))
    for entry in (*tables, *outputs):
        group = equal_to.get(keys[entry.name])
        if group is not None:
            group.append(entry.name)
            continue
        groups.append([entry.name])
        if may_be_vocabulary(entry.name):
            equal_to[keys[entry.name]] = groups[-1]
    for name, entry in entries.items():
        own = [n for n in habits.bias_names(name) if n in entries]
        if len(entry.shape) != 1 or own[:1] != [name]:
            continue  # no such bias, or the second of two
        equal = len(own) == 2 and entries[own[1]].shape == entry.shape
        if equal and _equal_in(base, entry, own[1]):
            groups.append(own)
        else:
            groups += [[n] for n in own]
    return groups


def join(model: TiedModel, groups: list[Group], expert: Expert) -> frozenset[str]:
    """Add an expert's names to the groups; return its tensors that are no tensors of their own.

    These are copies of what it holds under the base's names, or the base's tied tensors.
    """
    explained: set[str] = set()
    contents = _contents(groups, expert)
    tied: dict[Hashable, list[tuple[Group, str]]] = {}  # content -> groups, names
    for group in groups:
        for name in group.names:
            if name in contents:
                tied.setdefault(contents[name], []).append((group, name))
    tables = {contents.get(n) for n in expert.entries if may_be_vocabulary(n)}
    for name, entry in expert.extra.items():
        content = contents.get(name) if _is_table(name, entry) else None
        equal = (g for g, own in tied.get(content, ()) if own != name)
        group = next((g for g in equal if g.entry.shape == entry.shape), None)
        if group is None:
            group = _group_of(model, groups, expert, entry, name)
        if group is not None and name not in group.names:
            group.others.append(name)
            tied.setdefault(content, []).append((group, name))
        if group is not None or (content is not None and content in tables):
            explained.add(name)
    return frozenset(explained | repeated(expert, expert.extra.keys()))


def _is_table(name: str, entry: TensorEntry) -> bool:
    return len(entry.shape) == 2 and (is_output(name) or may_be_vocabulary(name))


def _contents(groups: list[Group], expert: Expert) -> dict[str, Hashable]:
    """Return the content of an expert's tables by name, where it has some that the base lacks."""
    extra = [n for n, e in expert.extra.items() if _is_table(n, e)]
    if not extra:
        return {}
    names = [*(n for g in groups for n in g.names), *filter(may_be_vocabulary, expert.entries)]
    held = {n: expert.stored[n] for n in (*extra, *names) if _holds(expert, n)}
    keys = content_keys(expert.source.read, held.values())
    return {name: keys[entry.name] for name, entry in held.items()}


def has(expert: Expert, name: str, like: TensorEntry) -> bool:
    """Tell whether an expert holds, or changes, a tensor in this shape."""
    entry = expert.entries.get(name) or expert.extra.get(name)
    return entry is not None and entry.shape == like.shape


def same_in(expert: Expert, first: str, second: str) -> bool:
    """Tell whether an expert stores the same values, or trained the same rows, under two names."""
    if first == second:
        return True
    rows, other = expert.changes.get(first), expert.changes.get(second)
    if isinstance(rows, TokenRows) and isinstance(other, TokenRows):
        return rows.same_as(other)
    if not (_holds(expert, first) and _holds(expert, second)):
        return False
    one, two = expert.stored[first], expert.stored[second]
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    read = expert.source.read
    return same_values(Stored(read, one.name), Stored(read, two.name), one.numel)


def _output_of(group: Group, model: TiedModel, biases: Iterable[str]) -> list[str]:
    """Return the name of the output layer that a base's file leaves out, since its table is it."""
    if not (group.tables and model.extends and model.tied):
        return []
    return [habits.output_name(group.tables[0], biases, model.base.entries, model.config)]


def _group_of(
    model: TiedModel, groups: list[Group], expert: Expert, entry: TensorEntry, name: str
) -> Group | None:
    """Return the group of a tensor that the base's file lacks, None where it is not tied."""
    alike = [g for g in groups if g.entry.shape == entry.shape]
    if len(entry.shape) == 1:
        return next((g for g in alike if name in g.names), None)
    known = habits.is_token_table(name) or is_output(name)
    if len(entry.shape) != 2 or not (known or may_be_vocabulary(name)):
        return None
    named = [g for g in alike if name in g.names]
    if not named and known and model.extends:
        named = [g for g in alike if _may_be(model, g, name, expert)]
    return named[0] if len(named) == 1 else None


def _may_be(model: TiedModel, group: Group, name: str, expert: Expert) -> bool:
    """Tell whether a group may have one more name, of a table that the base has no other of."""
    writes = [n for n in group.held if is_output(n)]
    lacking = not expert.is_delta and not any(has(expert, n, group.entry) for n in group.names)
    if lacking and any(habits.may_be_shared(name, n) for n in group.tables):
        return True
    # The expert has the table as its other end alone, or trained that apart, which says nothing
    # where nobody says that the base has such an end.
    other_end = group.tables and not writes if is_output(name) else writes and not group.tables
    return bool(other_end) and (lacking or bool(model.tied))


def _holds(expert: Expert, name: str) -> bool:
    return name in expert.stored and not expert.acts_on(name)


def _equal_in(base: TensorSource, first: TensorEntry, second: str) -> bool:
    return same_values(Stored(base.read, first.name), Stored(base.read, second), first.numel)
