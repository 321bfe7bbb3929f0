"""The guard: no fine-tuned tensor is left behind because the base calls it otherwise.

A tensor that the base lacks is kept for its expert alone, and one that an expert lacks counts as
unchanged. Both are right for heads, and wrong for a body under other names: the merge would be the
base's. All from headers, and a few samples that tell copies of a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.names import TRIED
from eutectic.conventions import is_token_embedding, layer_group
from eutectic.conventions_heads import is_buffer, is_output_layer, output_part
from eutectic.conventions_patterns import fits
from eutectic.conventions_ties import is_layer_stack
from eutectic.errors import Fault
from eutectic.planning.inputs import MergeRequest
from eutectic.types import Treatment
from eutectic.words import few, percent

# Of the base's numbers: what is larger is no head, whatever it is called.
SMALL = 0.02

Shaped = tuple[str, tuple[int, ...]]  # a name, or a part of one, and a shape


def coverage_faults(request: MergeRequest) -> list[Fault]:
    """Return a fault for every expert that is deeper or shallower, or named otherwise in parts."""
    if request.recipe.unmatched == "leave":
        return []
    inputs = request.inputs
    experts = dict(inputs.experts)
    if inputs.initial is not None:
        experts["initial"] = inputs.initial
    faults: list[Fault] = []
    for name, expert in experts.items():
        line = request.document.line("experts", name)
        depth, beyond = _depth_faults(name, expert, request, line)
        faults += depth
        missing, extra = (
            [n for n in names if n not in beyond] for names in _sides(name, expert, request)
        )
        if extra:
            faults.append(_unmatched(name, expert, missing, extra, request, line))
    return faults


def unmatched(request: MergeRequest) -> dict[str, list[str]]:
    """Return expert -> its tensors that meet none of the base's and are no heads."""
    experts = request.inputs.experts.items()
    return {name: _sides(name, expert, request)[1] for name, expert in experts}


def _sides(owner: str, expert: Expert, request: MergeRequest) -> tuple[list[str], list[str]]:
    """Return what is lost of the base and what is homeless of the expert, if that is no head."""
    if not (expert.missing or expert.extra):
        return [], []
    extra = homeless(owner, expert, request)
    missing = lost(owner, expert, request) + _renamed_heads(expert.missing, extra)
    if not missing and _beside_the_body(extra, expert, request):
        return [], []
    return missing, extra


def homeless(owner: str, expert: Expert, request: MergeRequest) -> list[str]:
    """Return the tensors that the base lacks, without heads, tied ones and buffers."""
    renamed = _Renamed.of(owner, expert, request)
    return [
        name
        for name, entry in expert.extra.items()
        if entry.numel
        and not _ruled(name, request)
        and not is_buffer(name, len(entry.shape))
        and not (is_output_layer(name) and not renamed.found(name, entry.shape))
        and name not in request.ties.explained.get(owner, ())
    ]


@dataclass(frozen=True)
class _Renamed:
    """What tells an output layer that is a tensor of the base under another name.

    That is a head of the base with a longer or shorter prefix, or another parameter of its module;
    a matrix of the vocabulary's shape in place of the base's; and what an expert has in place of
    the base's body: the same end, or a name inside a module that it lacks, or beside it.
    """

    heads: frozenset[Shaped]  # of the base, lacking: names from the output layer on
    modules: frozenset[Shaped]  # of these, and what holds the lost modules of the body
    tables: frozenset[tuple[int, ...]]  # the vocabulary's shapes, where one of these is lacking
    ends: frozenset[Shaped]  # of what is lost of the body
    inner: frozenset[str]  # lost modules without modules in them

    @classmethod
    def of(cls, owner: str, expert: Expert, request: MergeRequest) -> _Renamed:
        base = request.inputs.base.entries
        lacking = [n for n in expert.missing if request.ties.source(owner, expert, n) is None]
        heads = {(p, base[n].shape) for n in lacking if (p := output_part(n)) is not None}
        tables = {e.shape for n, e in base.items() if is_token_embedding(n)}
        body = lost(owner, expert, request)
        outer = {_module(_module(name)) for name in base}
        modules = {(_module(n), base[n].shape) for n in lacking if is_output_layer(n)}
        modules |= {(m, base[n].shape) for n in body if "." in (m := _module(_module(n)))}
        return cls(
            frozenset(heads),
            frozenset(modules),
            frozenset(tables & {base[n].shape for n in lacking}),
            frozenset((_end(n), base[n].shape) for n in body if "." in n),
            frozenset(m for n in body if (m := _module(n)) and m not in outer),
        )

    def found(self, name: str, shape: tuple[int, ...]) -> bool:
        """Tell whether an output layer of this name is such a tensor."""
        part = output_part(name) or name
        if any(size == shape and _ends_alike(part, other) for other, size in self.heads):
            return True
        module = _module(name)
        if shape in self.tables or (module, shape) in self.modules:
            return True
        if part.startswith("pooler."):  # BEiT's norm moves there when a head is put on
            return False
        inside = any(name.startswith(f"{lost}.") for lost in self.inner)
        return (
            inside or (_module(module), shape) in self.modules or (_end(name), shape) in self.ends
        )


def _ends_alike(one: str, other: str) -> bool:
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def lost(owner: str, expert: Expert, request: MergeRequest) -> list[str]:
    """Return the base's tensors that the expert lacks, without heads, tied ones and buffers."""
    base = request.inputs.base.entries
    return [
        name
        for name in expert.missing
        if not (
            is_output_layer(name)
            or is_buffer(name, len(base[name].shape))
            or not base[name].numel
            or request.ties.source(owner, expert, name) is not None
            or _ruled(name, request)
        )
    ]


def numbers(names: Iterable[str], entries: Mapping[str, TensorEntry]) -> int:
    """Return how many numbers some tensors hold."""
    return sum(entries[name].numel for name in names if name in entries)


def _renamed_heads(missing: Sequence[str], extra: Sequence[str]) -> list[str]:
    """Return the base's heads that stand against output layers among the expert's tensors."""
    parts = [part for name in extra if (part := output_part(name)) is not None]
    return [
        name
        for name in missing
        if (own := output_part(name)) is not None and any(_ends_alike(own, p) for p in parts)
    ]


def _ruled(name: str, request: MergeRequest) -> bool:
    """Tell whether a rule of the recipe says that a tensor is no part of the merge."""
    matching = (r for r in request.recipe.tensors if fits(name, r.match))
    treatment = next((r.treatment for r in matching if r.treatment is not None), None)
    return treatment in (Treatment.COPY, Treatment.HEAD)


def _beside_the_body(extra: Sequence[str], expert: Expert, request: MergeRequest) -> bool:
    """Tell whether tensors are new modules at the root: heads by position, of unusual names.

    They are small, share no module with the base, and end like none of its tensors.
    """
    base = request.inputs.base.entries
    roots = {name.split(".")[0] for name in base}
    taken, shared = roots, ""
    if len(roots) == 1 and all(name.count(".") > 1 for name in base):
        # One module holds all; a model may put its heads beside it or in it.
        (shared,) = roots
        taken = {name.split(".")[1] for name in base}
    ends = {_end(name) for name in base if "." in name}
    for name in extra:
        own = name.removeprefix(f"{shared}.") if shared else name
        if own.split(".")[0] in {*taken, shared} or _end(name) in ends:
            return False
    return numbers(extra, expert.extra) <= SMALL * numbers(base, base)


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _unmatched(
    name: str,
    expert: Expert,
    missing: Sequence[str],
    extra: Sequence[str],
    request: MergeRequest,
    line: int,
) -> Fault:
    base = request.inputs.base.entries
    own = {**expert.entries, **expert.extra}
    has = f"{_tensors(extra)} of the expert ({_share(extra, own)} of its numbers)"
    shown = layer_group(extra[0])
    what = f"{has} are neither tensors of the base nor heads by position."
    choose = f"If they are heads, say so by a rule: {{match: '{shown}', treatment: head}}. "
    if missing:
        lacks = f"{_tensors(missing)} of the base ({_share(missing, base)} of its numbers)"
        what = f"{has} meet none of the base, and {lacks} none of the expert."
        choose = "Rename the expert's tensors as the base's. "
    listed = "".join(f"\n{text}" for text in patterns(missing, extra))
    choose += "unmatched: leave (--set unmatched=leave) merges without them"
    choose += ": the output has the base's values there." if missing else "."
    where = f"expert '{name}'" if name != "initial" else "init"
    return Fault("unmatched", f"{what}{listed}\nTried: {TRIED}.", where, line, next=f"\n{choose}")


def _tensors(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''}"


def _share(names: Iterable[str], entries: Mapping[str, TensorEntry]) -> str:
    return percent(numbers(names, entries) / max(numbers(entries, entries), 1))


def patterns(missing: Sequence[str], extra: Sequence[str], limit: int = 4) -> list[str]:
    """Return lines that set both sides against each other, alike tensors together.

    Tensors that end alike differ in what comes before (`model.* ↔ language_model.*`); those of one
    module in their own names. The rest stands on its side alone.
    """
    left = set(missing)
    by_end: dict[str, list[str]] = {}
    for name in reversed(missing):  # the first of a kind is taken first, from the end of its list
        for end in _ends(name):
            by_end.setdefault(end, []).append(name)
    moved: Counter[tuple[str, str]] = Counter()
    rest: list[str] = []
    for name in extra:
        partner, end = _longest(name, by_end, left)
        if partner is None:
            rest.append(name)
            continue
        left.discard(partner)
        sides = (partner.removesuffix(end), name.removesuffix(end))
        moved[layer_group(sides[0]), layer_group(sides[1])] += 1
    lines = [
        f"base ↔ expert: {base}* ↔ {own}* ({count} tensor{'s' if count > 1 else ''})"
        for (base, own), count in moved.most_common(limit)
    ]
    others = [n for n in missing if n in left]
    both = {_module(n) for n in others} & {_module(n) for n in rest}
    for module in sorted({layer_group(m) for m in both})[:limit]:
        base, own = (_leaves(names, module, both) for names in (others, rest))
        lines.append(f"base ↔ expert: {module}.{base} ↔ {module}.{own}")
    sides = (("the base alone", others), ("the expert alone", rest))
    for label, names in sides:
        counts = Counter(layer_group(n) for n in names if _module(n) not in both)
        if counts:
            shown = [f"{p} ×{n}" if n > 1 else p for p, n in counts.most_common()]
            lines.append(f"{label}: {few(shown, limit)}")
    return lines


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _leaves(names: Iterable[str], module: str, both: Collection[str]) -> str:
    """Return the own names of a module's parameters, such as `{beta, gamma}`."""
    own = {
        n.rpartition(".")[2]
        for n in names
        if _module(n) in both and layer_group(_module(n)) == module
    }
    return f"{{{few(sorted(own))}}}" if len(own) > 1 else "".join(own)


def _ends(name: str) -> Iterator[str]:
    """Yield what a name ends with, of two components at least, the longest first."""
    components = name.split(".")
    for start in range(len(components) - 1):
        yield ".".join(components[start:])


def _longest(
    name: str, by_end: Mapping[str, list[str]], left: Collection[str]
) -> tuple[str | None, str]:
    """Return the tensor that is left and ends like a name in most components, and that end."""
    for end in _ends(name):
        alike = by_end.get(end, [])
        while alike and alike[-1] not in left:
            alike.pop()
        if alike:
            return alike[-1], end
    return None, ""


_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def _depth_faults(
    name: str, expert: Expert, request: MergeRequest, line: int
) -> tuple[list[Fault], set[str]]:
    """Return faults of stacks with more layers on one side, and the tensors of those layers.

    Layers that the expert lacks, where both configurations state one depth, are beside the stack:
    transformers leaves out those that predict several tokens.
    """
    if expert.is_delta or not (expert.missing or expert.extra):
        return [], set()
    base = request.inputs.base.entries
    own = [*expert.entries, *expert.extra]
    theirs, ours = _stacks(base), _stacks(own)
    stated, held = _stated_depth(request.inputs.config), _stated_depth(expert.config)
    asked = request.recipe.missing != "error"
    faults: list[Fault] = []
    beyond: set[str] = set()
    for path in sorted(theirs.keys() & ours.keys()):
        there, here = theirs[path], ours[path]
        if there.keys() == here.keys() or not there.keys() & here.keys():
            continue
        more, fewer = (here, there) if len(here) > len(there) else (there, here)
        alone = [n for i, names in more.items() if i not in fewer for n in names]
        if not alone or beyond.issuperset(alone) or not set(fewer) <= set(more):
            continue
        # Layers from the first on are a shallower model, others a checkpoint in parts, and so are
        # those of a user who says that what an expert lacks is unchanged.
        parts = asked or sorted(fewer) != list(range(len(fewer)))
        if more is there and (parts if None in (stated, held) else stated == held):
            continue
        shared = () if is_layer_stack(path) else _tied(name, expert, request)
        if all(n in shared or is_output_layer(n) or _ruled(n, request) for n in alone):
            continue
        beyond.update(alone)
        word = "experts" if path.endswith("experts") else "layers"
        what = f"{path} has {len(here)} {word} against {len(there)} of the base."
        choose = (
            "Only models of one architecture can be merged. unmatched: leave "
            f"(--set unmatched=leave) merges the {word} that both have."
        )
        faults.append(Fault("other_depth", what, f"expert '{name}'", line, next=choose))
    return faults, beyond


def _tied(owner: str, expert: Expert, request: MergeRequest) -> set[str]:
    """Return the tensors that only one side holds under these names, and both have."""
    ties = request.ties
    found = {n for n in expert.missing if ties.source(owner, expert, n) is not None}
    return found | ties.explained[owner]


def _stacks(names: Iterable[str]) -> dict[str, dict[int, list[str]]]:
    """Return path of a stack -> number of a layer -> its tensors; like stacks are taken as one."""
    found: dict[str, dict[int, list[str]]] = {}
    for name in names:
        components = name.split(".")
        for position, word in enumerate(components[:-1]):
            if position and word.isdecimal():
                path = layer_group(".".join(components[:position]))
                found.setdefault(path, {}).setdefault(int(word), []).append(name)
    return found


def _stated_depth(config: Mapping[str, Any]) -> int | None:
    parts = (config, *(v for v in config.values() if isinstance(v, Mapping)))
    return next((p[key] for p in parts for key in _DEPTHS if isinstance(p.get(key), int)), None)
