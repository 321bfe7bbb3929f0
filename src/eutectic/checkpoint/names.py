"""Names: of files inside a checkpoint folder, and of tensors in two checkpoints of one model."""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path

from eutectic.conventions_names import (
    Canonical,
    canonical,
    is_frozen_copy,
    is_trained_copy,
    unwrapped,
)
from eutectic.errors import CheckpointError
from eutectic.sentences import read_as
from eutectic.words import shown

_MAX_EXTRA_COMPONENTS = 3
_LONGEST_NAME = 255  # bytes, as file systems have it
_MOST_READINGS = 8  # prefixes that fit equally well; more are as ambiguous as two
# What was tried where names do not meet, for messages.
TRIED = (
    "a common prefix, wrappers (_orig_mod, module, _fsdp_wrapped_module, base_layer), the prefixes "
    "of vision-language models, gamma/beta, weight_g/weight_v, packed and "
    "single matrices of mixtures, and transformers' own renaming where it is installed"
)


def is_plain_name(name: str) -> bool:
    """Tell whether a name can be a file's in any folder, and nothing else."""
    wrong = name in {"", ".", ".."} or any(c in name for c in "/\\:\0")
    return not wrong and len(name.encode("utf-8", "replace")) <= _LONGEST_NAME


def check_plain_name(name: str, where: str) -> None:
    """Raise CheckpointError unless `name` is a plain file name: no folder, no '..', no drive."""
    if not is_plain_name(name):
        raise CheckpointError(
            f"{where} names the file {shown(name)}, which is not a plain name in its own folder.\n"
            "Refused: a checkpoint may not read files elsewhere."
        )


def check_inside(folder: Path, name: str) -> Path:
    """Return the path of file `name` in `folder` after following links.

    The file must lie inside the folder. One exception: the cache of the Hugging Face hub, where
    `…/snapshots/<revision>/x` links to `…/blobs/<hash>`.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is missing, or a link that leads nowhere.") from error
    home = folder.resolve()
    if not real.is_relative_to(home) and not _is_hub_blob(home, real):
        raise CheckpointError(
            f"{path} is a link that leads out of its folder, to {real}.\n"
            "Refused: a checkpoint may not read files elsewhere (links of the hub's cache are "
            "understood).\nPut the file itself there, or name the other folder."
        )
    if not real.is_file():
        raise CheckpointError(f"{path} is not a regular file.")
    return real


def _is_hub_blob(home: Path, real: Path) -> bool:
    # <cache>/models--org--name/snapshots/<revision>/x -> <cache>/models--org--name/blobs/<hash>,
    # which newer versions make a link to <cache>/blobs/<two digits>/<hash>.
    for folder in (home, *home.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and "--" in repository.name:
            shared = repository.parent / "blobs"
            return real.parent == repository / "blobs" or real.parent.parent == shared
    return False


@dataclass(frozen=True)
class Reading:
    """One kind of spelling in which an expert's keys differ from the base's names."""

    own: str  # as the expert writes it; "" where only the base has such a component
    base: str  # as the base writes it; "" where only the expert has such a component
    count: int  # tensors

    def __str__(self) -> str:
        return read_as(self.own, self.base, self.count)


@dataclass(frozen=True)
class Alignment:
    """How an expert's keys were read as the base's names.

    `strip` and `add` are leading components that its keys have in excess of the base's ("bert."),
    or lack; `readings` are known equivalences; `copies` are keys that say again what another says.
    """

    strip: str = ""
    add: str = ""
    readings: tuple[Reading, ...] = ()
    copies: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = "its keys as they are"
        if self.strip and self.add:
            text = f"its prefix '{self.strip}' as '{self.add}'"
        elif self.strip:
            text = f"its keys without the prefix '{self.strip}'"
        elif self.add:
            text = f"its keys with the prefix '{self.add}'"
        return "; ".join([text, *map(str, self.readings)])

    def to_base(self, key: str, base_names: Container[str]) -> str:
        """Return the base's name for one key of the expert, whether the base has it or not."""
        if self.strip:
            inside = key.startswith(self.strip)
            return self.add + key[len(self.strip) :] if inside else key
        if self.add and (self.add + key in base_names or key not in base_names):
            return self.add + key
        return key

    def form_of_key(self, key: str) -> Canonical:
        """Return the canonical form of an expert's key, without what only the expert has."""
        return canonical(key.removeprefix(self.strip))

    def form_of_name(self, name: str) -> Canonical:
        """Return the canonical form of a base's name, without what only the base has."""
        return canonical(name.removeprefix(self.add))


Same = Callable[[str, str], bool]  # tells whether two keys of an expert hold the same values


def align(
    base_names: Iterable[str],
    expert_names: Iterable[str],
    *,
    expert: str = "the expert",
    same: Same | None = None,
) -> tuple[dict[str, str], Alignment]:
    """Return which key of the base each key of the expert means, and by what alignment.

    Keys agree as they are, or one side carries extra leading components ("bert.", "model.",
    "base_model.model."), or both are known spellings of one name (`conventions_names`): the choice
    that lets most keys meet wins. CheckpointError where two choices are as good and differ, or
    where two keys mean one name and `same` does not say that they hold the same. Keys without a
    partner are left out of the mapping. Linear.
    """
    base = tuple(dict.fromkeys(base_names))
    keys = [key for key in dict.fromkeys(expert_names)]
    frozen = _frozen_copies(keys)
    if not frozen and len(keys) == len(base) and frozenset(base).issuperset(keys):
        return dict(zip(keys, keys, strict=True)), Alignment()
    keys = [key for key in keys if key not in frozen]
    winners = _literal(frozenset(base), keys)
    chosen = [_met(base, keys, alignment) for alignment in winners]
    if len(chosen) > 1 or len(chosen[0].mapping) < len(keys):
        chosen = _canonically(base, keys, winners)
    first = chosen[0]
    for other in chosen[1:]:
        if other.mapping != first.mapping:
            _refuse_two_ways(expert, first, other, len(keys))
    copies = _checked_copies(first, expert, same)
    alignment = replace(first.alignment, readings=_readings(first, base), copies=(*frozen, *copies))
    return first.mapping, alignment


@dataclass
class _Meeting:
    """Which keys meet under one choice of a prefix."""

    alignment: Alignment
    mapping: dict[str, str]  # key of the expert -> name of the base
    again: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # key, name taken


def _frozen_copies(keys: list[str]) -> tuple[str, ...]:
    """Return the keys of modules that PEFT keeps unchanged beside the trained ones."""
    frozen = [key for key in keys if is_frozen_copy(key)]
    if not frozen:
        return ()
    trained = {unwrapped(key) for key in keys if is_trained_copy(key)}
    return tuple(key for key in frozen if unwrapped(key) in trained)


def _literal(base: frozenset[str], keys: list[str]) -> list[Alignment]:
    """Return the prefixes that let most keys meet as they are written."""
    if len(keys) >= len(base) and all(key in base for key in keys):
        return [Alignment()]  # no prefix lets more of them meet
    present = frozenset(keys)
    met = Counter(("strip", p) for key in keys for p in _prefixes(key) if key[len(p) :] in base)
    met.update(("add", p) for key in base for p in _prefixes(key) if key[len(p) :] in present)
    best = max(met.values(), default=0)
    as_they_are = sum(key in base for key in keys)
    if as_they_are >= best:
        return [Alignment()]
    return _winners(met, best)


def _winners(met: Counter[tuple[str, str]], best: int) -> list[Alignment]:
    winners = sorted((c for c, count in met.items() if count == best), key=lambda c: (len(c[1]), c))
    few = winners[:_MOST_READINGS]
    return [Alignment(strip=p) if side == "strip" else Alignment(add=p) for side, p in few]


def _met(base: tuple[str, ...], keys: list[str], alignment: Alignment) -> _Meeting:
    """Return the keys that meet as they are written, after the prefix."""
    names = frozenset(base)
    found = _Meeting(alignment, {})
    taken: set[str] = set()
    for key in keys:
        name = alignment.to_base(key, names)
        if name in taken:
            found.again.append((key, name))
        elif name in names:
            taken.add(name)
            found.mapping[key] = name
    return found


def _canonically(
    base: tuple[str, ...], keys: list[str], winners: list[Alignment]
) -> list[_Meeting]:
    """Let keys meet in the form that all their spellings share.

    The prefix of most literal meetings stays, unless another one lets more keys meet.
    """
    found = [_with_forms(_met(base, keys, a), base, keys) for a in winners]
    most = max(len(f.mapping) for f in found)
    if most < min(len(keys), len(base)):
        own, names = ({_form(n) for n in side} for side in (keys, base))
        met = Counter(
            ("strip", p) for k in keys for p in _prefixes(k) if _form(k[len(p) :]) in names
        )
        met.update(("add", p) for n in base for p in _prefixes(n) if _form(n[len(p) :]) in own)
        highest = max(met.values(), default=0)
        more = _winners(met, highest) if highest > most else []
        # What holds the whole model may have a name of its own on either side.
        more += [Alignment(p, q) for p in _common_prefixes(keys) for q in _common_prefixes(base)]
        others = [_with_forms(_met(base, keys, a), base, keys) for a in more]
        if others and (better := max(len(f.mapping) for f in others)) > most:
            found, most = others, better
    return [f for f in found if len(f.mapping) == most]


def _common_prefixes(names: Sequence[str]) -> list[str]:
    """Return the leading components that all names share, the shortest first."""
    return [p for p in _prefixes(names[0]) if all(name.startswith(p) for name in names)]


def _form(name: str) -> str:
    return canonical(name).name


def _with_forms(found: _Meeting, base: tuple[str, ...], keys: list[str]) -> _Meeting:
    """Add the keys that meet only in the form that all their spellings share."""
    forms: dict[str, list[str]] = {}
    for name in base:
        forms.setdefault(found.alignment.form_of_name(name).name, []).append(name)
    held = {name: key for key, name in found.mapping.items()}
    for key in keys:
        if key in found.mapping:
            continue
        names = forms.get(found.alignment.form_of_key(key).name, [])
        if len(names) != 1:
            continue
        (name,) = names
        if name in held:
            found.again.append((key, name))
        else:
            held[name] = key
            found.mapping[key] = name
    return found


def _checked_copies(found: _Meeting, expert: str, same: Same | None) -> list[str]:
    """Return the keys that repeat what another key says; refuse those that say something else."""
    held = {name: key for key, name in found.mapping.items()}
    copies: list[str] = []
    for key, name in found.again:
        first = held.get(name)
        if first is None:
            continue
        if same is None or not same(first, key):
            raise CheckpointError(
                f"{expert}: the keys '{first}' and '{key}' both mean '{name}' of the base "
                f"({found.alignment}).\n"
                + ("" if same is None else "They hold different values. ")
                + "Rename the keys of the expert as the base's, or leave out the wrong one."
            )
        copies.append(key)
    return copies


def _refuse_two_ways(expert: str, first: _Meeting, other: _Meeting, keys: int) -> None:
    readings: list[str] = []
    differing = next(k for k in {**first.mapping, **other.mapping} if _differ(k, first, other))
    for found in (first, other):
        name = found.mapping.get(differing)
        means = f"means '{name}'" if name else "has no partner"
        readings.append(f"{found.alignment}: '{differing}' {means}")
    prefixes = ", ".join(f"'{f.alignment.strip or f.alignment.add}'" for f in (first, other))
    raise CheckpointError(
        f"{expert}: its keys fit the base's in more than one way ({len(first.mapping)} of {keys} "
        f"keys each with the prefixes {prefixes}).\n"
        f"Either {readings[0]}, or {readings[1]}.\n"
        "Is it a fine-tune of this base? If so, rename its keys as the base's."
    )


def _differ(key: str, first: _Meeting, other: _Meeting) -> bool:
    return first.mapping.get(key) != other.mapping.get(key)


def _readings(found: _Meeting, base: Iterable[str]) -> tuple[Reading, ...]:
    """Return what was read as something else, beside the one prefix."""
    met: Counter[tuple[str, str]] = Counter()
    names = frozenset(base)
    for key, name in found.mapping.items():
        if found.alignment.to_base(key, names) == name:
            continue
        own, other = found.alignment.form_of_key(key), found.alignment.form_of_name(name)
        if own.leading != other.leading:
            met[own.leading, other.leading] += 1
        if own.wrappers - other.wrappers:
            met[f"{'., '.join(sorted(own.wrappers - other.wrappers))}.", ""] += 1
        if other.wrappers - own.wrappers:
            met["", f"{'., '.join(sorted(other.wrappers - own.wrappers))}."] += 1
        met.update(own.renamed - other.renamed)
        met.update((base, spelt) for spelt, base in other.renamed - own.renamed)
    return tuple(Reading(own, base, count) for (own, base), count in met.items())


def _prefixes(key: str) -> list[str]:
    components = key.split(".")[:-1][:_MAX_EXTRA_COMPONENTS]
    return list(accumulate(f"{component}." for component in components))
