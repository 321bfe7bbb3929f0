"""Which tensors of an expert make which of the base: by name, by layout, then by transformers.

Each step sees what the one before has left over; what is left at the end, one side alone has.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from eutectic.checkpoint.arranged import View
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.layouts import Forms, layout_readings, rearranged
from eutectic.checkpoint.library_names import library_forms
from eutectic.checkpoint.names import Alignment, Reading, align
from eutectic.checkpoint.reader import TensorSource
from eutectic.conventions_names import LANGUAGE, OUTPUTS, canonical, output_leading, unwrapped

_COMPARED = 1 << 20  # elements of two tensors that are compared at a time

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Meeting:
    """How the tensors of an expert and of the base meet."""

    mapping: Mapping[str, str]  # key of the expert -> name of the base that means the same tensor
    alignment: Alignment
    views: Mapping[str, View]  # name of the base -> the expert's tensors that make it up
    rest: Mapping[str, str]  # key that meets nothing -> its name as the base would spell it


def meet(
    source: TensorSource, base: Mapping[str, TensorEntry], label: str, configs: Sequence[Config]
) -> Meeting:
    """Return how a full checkpoint meets the base; `configs` are the base's and its own."""
    own = source.entries
    mapping, alignment = align(base, own, expert=label, same=partial(_same_values, source))
    aligned = alignment
    views = rearranged((base, own), mapping, _forms(aligned), configs, label)
    used = {*mapping, *alignment.copies}.union(*(view.keys for view in views.values()))
    met = {*mapping.values(), *views}
    left = [name for name in base if name not in met], [key for key in own if key not in used]
    more, forms = _by_library(left, aligned, configs, label)
    if forms:
        mapping, alignment = {**mapping, **more}, _told(alignment, more)
        views = rearranged((base, own), mapping, _forms(aligned, forms), configs, label)
        used = {*mapping, *alignment.copies}.union(*(view.keys for view in views.values()))
    if views:
        readings = (*alignment.readings, *layout_readings(views))
        alignment = replace(alignment, readings=readings)
    rest = [key for key in own if key not in used]
    return Meeting(mapping, alignment, views, named_like_base(rest, mapping, alignment, base))


def meet_names(
    base: Collection[str], own: Collection[str], label: str, configs: Sequence[Config]
) -> tuple[Mapping[str, str], Alignment]:
    """Return which names of the base an adapter acts on, and by what alignment."""
    mapping, alignment = align(base, own, expert=label)
    met = frozenset(mapping.values())
    left = [name for name in base if name not in met], [key for key in own if key not in mapping]
    more, _ = _by_library(left, alignment, configs, label)
    return {**mapping, **more}, _told(alignment, more)


def _by_library(
    left: tuple[Sequence[str], Sequence[str]],
    alignment: Alignment,
    configs: Sequence[Config],
    label: str,
) -> tuple[dict[str, str], Mapping[str, str]]:
    """Return the keys that meet a name as transformers relates them, and what it calls both.

    Where nothing met before it, one side may still carry the prefix of a model with a head.
    """
    bare = (
        {name: name.removeprefix(alignment.add) for name in left[0]},
        {key: key.removeprefix(alignment.strip) for key in left[1]},
    )
    forms = library_forms([*bare[0].values()], bare[1].values(), configs)
    if not forms:
        return {}, {}
    theirs = _unique(bare[0], lambda name: forms.get(bare[0][name], bare[0][name]))
    ours = _unique(bare[1], lambda key: forms.get(bare[1][key], bare[1][key]))
    met, _ = align(theirs, ours, expert=label)
    return {ours[own]: theirs[name] for own, name in met.items()}, forms


def _forms(alignment: Alignment, library: Mapping[str, str] | None = None) -> Forms:
    """Return how names of the base, and keys of the expert, are compared."""
    known = library or {}

    def name_form(name: str) -> str:
        bare = name.removeprefix(alignment.add)
        return known.get(bare) or canonical(bare).name

    def key_form(key: str) -> str:
        bare = key.removeprefix(alignment.strip)
        return known.get(bare) or canonical(bare).name

    return name_form, key_form


def _unique(names: Iterable[str], form: Callable[[str], str]) -> dict[str, str]:
    """Return form -> name, of forms that one name has."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(form(name), []).append(name)
    return {own: same[0] for own, same in found.items() if len(same) == 1}


def _told(alignment: Alignment, more: Mapping[str, str]) -> Alignment:
    if not more:
        return alignment
    told = Reading("names of another version of transformers", "the base's", len(more))
    return replace(alignment, readings=(*alignment.readings, told))


def named_like_base(
    keys: Sequence[str], mapping: Mapping[str, str], alignment: Alignment, base: Collection[str]
) -> dict[str, str]:
    """Return the names that keys which meet nothing would have in the base's spelling.

    Without wrappers, and with the leading components that the base gives to the same module.
    """
    known = frozenset(base)
    leading: dict[tuple[str, str], Counter[str]] = {}
    language: Counter[str] = Counter()
    for key, name in mapping.items() if keys else ():
        own, other = alignment.form_of_key(key), alignment.form_of_name(name)
        root = other.name.partition(".")[0]
        leading.setdefault((own.leading, root), Counter())[other.leading] += 1
        if root in LANGUAGE:
            language[other.leading] += 1
    head = output_leading(language.most_common(1)[0][0]) if language else ""
    named: dict[str, str] = {}
    taken: set[str] = set()
    for key in keys:
        called = alignment.to_base(key, known)
        name = unwrapped(key.removeprefix(alignment.strip))
        own = alignment.form_of_key(key)
        root = own.name.partition(".")[0]
        found = leading.get((own.leading, root))
        if found and len(found) == 1:
            name = alignment.add + next(iter(found)) + name.removeprefix(own.leading)
        elif language and root in OUTPUTS and name.startswith(own.leading):
            name = alignment.add + head + name.removeprefix(own.leading)
        else:
            name = unwrapped(called)
        if name in known or name in taken:
            name = called
        taken.add(name)
        named[key] = name
    return named


def _same_values(source: TensorSource, first: str, second: str) -> bool:
    """Tell whether two tensors of a checkpoint are the same, to the bit."""
    one, other = source.entries[first], source.entries[second]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for start in range(0, one.numel, _COMPARED):
        stop = min(one.numel, start + _COMPARED)
        a, b = source.read(first, start, stop), source.read(second, start, stop)
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return False
    return True
