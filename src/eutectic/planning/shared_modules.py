"""Equal tensors: whether two hold the same values, and modules that a file holds more than once.

Detectors share prediction heads between layers, and files hold one of them or all.
"""

import hashlib
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.header import TensorEntry
from eutectic.checkpoint.reader import TensorSource

_WINDOW = 1024
_PIECE = 1 << 22  # entries read at a time

Read = Callable[[str, int, int], torch.Tensor]


@dataclass(frozen=True)
class Stored:
    """A stored tensor: who reads flat ranges of it, and under which name."""

    read: Read
    name: str


def same_values(left: Stored, right: Stored, length: int) -> bool:
    """Tell whether two tensors of `length` entries are equal, bit by bit where the dtype is one.

    Tables that were trained apart differ almost everywhere, so that samples tell most of them;
    copies are read to the end, because the rows of rare tokens may be all that differs.
    """
    for start, stop in (*_samples(length), *_pieces(length)):
        a, b = left.read(left.name, start, stop), right.read(right.name, start, stop)
        wide = a.dtype != b.dtype
        a, b = (a.double(), b.double()) if wide else (a.view(torch.uint8), b.view(torch.uint8))
        if not torch.equal(a, b):
            return False
    return True


def content_keys(read: Read, entries: Iterable[TensorEntry]) -> dict[str, Hashable]:
    """Return a key of every tensor's content: those of equal tensors are equal, and of no others.

    Linear: samples tell most tensors, those that share them are read to the end, once each.
    """
    kinds: dict[Hashable, list[TensorEntry]] = {}
    for entry in entries:
        kinds.setdefault((entry.shape, entry.dtype), []).append(entry)
    for ranges in (_samples, _pieces):
        finer: dict[Hashable, list[TensorEntry]] = {}
        for key, own in kinds.items():
            for entry in own:
                told = _digest(read, entry, ranges(entry.numel)) if len(own) > 1 else b""
                finer.setdefault((key, told), []).append(entry)
        kinds = finer
    return {entry.name: key for key, own in kinds.items() for entry in own}


def _digest(read: Read, entry: TensorEntry, ranges: Iterable[tuple[int, int]]) -> bytes:
    digest = hashlib.sha256()
    for start, stop in ranges:
        digest.update(read(entry.name, start, stop).view(torch.uint8).numpy().data)
    return digest.digest()


def _samples(length: int) -> list[tuple[int, int]]:
    starts = (0, max(0, length // 2 - _WINDOW), max(0, length - _WINDOW))
    return [(start, min(length, start + _WINDOW)) for start in starts]


def _pieces(length: int) -> Iterator[tuple[int, int]]:
    return ((start, min(length, start + _PIECE)) for start in range(0, length, _PIECE))


def shared_in(
    base: TensorSource, experts: Iterable[Expert], known: Sequence[Sequence[str]]
) -> list[list[str]]:
    """Return groups of equal tensors of a base of which some expert lacks one.

    A base that holds the same numbers twice, to the last bit, shares them; but for constants (ones
    of a norm), which are equal by chance unless another tensor of their module is shared.
    `known` are groups that are known already.
    """
    taken = {n for names in known for n in names}
    missing = {n for e in experts if not e.is_delta for n in e.missing}.difference(taken)
    held = {n: e for n, e in base.entries.items() if n not in taken}
    return _equal(base.read, held, missing, known) if missing else []


def repeated(expert: Expert, names: Collection[str]) -> set[str]:
    """Return those of an expert's further tensors that repeat one that the base has too."""
    if expert.is_delta or not names:
        return set()
    held = {**expert.entries, **{n: expert.extra[n] for n in names}}
    groups = _equal(expert.read, held, names)
    return {n for own in groups if any(k in expert.entries for k in own) for n in own} & {*names}


def _equal(
    read: Read,
    held: Mapping[str, TensorEntry],
    wanted: Collection[str],
    known: Sequence[Sequence[str]] = (),
) -> list[list[str]]:
    """Return names of equal tensors, of which one is wanted, in the order of `held`."""
    kinds: dict[tuple[object, ...], list[str]] = {}
    for name, entry in held.items():
        if entry.numel and entry.dtype.is_floating_point:
            kinds.setdefault((entry.shape, entry.dtype, _leaf(name)), []).append(name)
    found: list[list[str]] = []
    constant: list[list[str]] = []
    for names in kinds.values():
        if len(names) < 2 or not any(n in wanted for n in names):
            continue
        alike: dict[bytes, list[str]] = {}
        for name in names:
            start = read(name, 0, min(held[name].numel, _WINDOW))
            alike.setdefault(start.view(torch.uint8).numpy().tobytes(), []).append(name)
        for rest in alike.values():
            own = [n for n in rest if _same(read, rest[0], n, held[n].numel)]
            if len(own) > 1 and any(n in wanted for n in own):
                values = read(own[0], 0, min(held[own[0]].numel, _PIECE))
                (constant if bool((values == values[0]).all()) else found).append(own)
    modules = [_modules(names) for names in (*known, *found) if len(names) > 1]
    for names in constant:
        for heads in modules:
            together: dict[str, list[str]] = {}
            for name in names:
                for head in heads:
                    if name.startswith(f"{head}."):
                        together.setdefault(name.removeprefix(head), []).append(name)
            own = [alike for alike in together.values() if len(alike) > 1]
            if own:
                found += own
                break
    return found


def _modules(names: Sequence[str]) -> list[str]:
    """Return what comes before the components with which all of several names end."""
    parts = [name.split(".") for name in names]
    common = 0
    shortest = min(map(len, parts))
    while common < shortest and len({tuple(p[len(p) - common - 1 :]) for p in parts}) == 1:
        common += 1
    return [".".join(p[: len(p) - common]) for p in parts]


def _same(read: Read, first: str, second: str, length: int) -> bool:
    return same_values(Stored(read, first), Stored(read, second), length)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
