"""A checkpoint or adapter against the base that it is said to be a fine-tune of."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from eutectic.checking.report import Finding
from eutectic.checkpoint.expert_tensors import Expert
from eutectic.checkpoint.experts import is_ia3, open_expert
from eutectic.checkpoint.index import CheckpointIndex
from eutectic.conventions_heads import is_buffer, is_output_layer
from eutectic.errors import CheckpointError, Fault, Note
from eutectic.vocabulary.tokens import Tokens
from eutectic.words import few, percent

_KIN = 0.5  # share of the base's numbers that a fine-tune of it has in the base's shapes


@dataclass(frozen=True)
class Base:
    """A full checkpoint that others are compared with."""

    path: str  # as it was named
    index: CheckpointIndex  # its logical tensors
    tokens: Tokens | None


def findings_against(
    folder: Path, tokens: Tokens | None, base: Base, others: Sequence[Base], *, stated: bool
) -> Iterator[Finding]:
    """Yield where names and shapes do not fit the base, and which of the others they do fit.

    `stated`: the user named the base; else it is a guess, and what does not fit is unusual only.
    """
    try:
        if is_ia3(folder):
            return  # meets other (IA)³ adapters, not the base's matrices
        with closing(open_expert(folder, base.index)) as expert:
            share = _share(expert, base)
            fits = expert.is_delta or share >= _KIN
            found = [*_differences(expert, base)]
        why = f"only {percent(share)} of the numbers have a partner of their shape"
    except CheckpointError as error:
        fits, found, why = False, [], str(error)
    if fits:
        yield from found
        yield from _tokens(tokens, base)
        return
    kin = {other.path: share for other in others if (share := _fit(folder, other)) >= _KIN}
    if kin:
        nearest = max(kin, key=kin.__getitem__)
        yield Note("fits_other_base", (nearest,), {"base": base.path}, "warning")
    if stated:
        yield Fault("other_base", f"no fine-tune of {base.path}: {why.removeprefix(f'{folder}: ')}")
    elif not kin:
        yield Note("unrelated_names", (base.path,), {"why": why.splitlines()[0]}, "warning")


def _fit(folder: Path, base: Base) -> float:
    """Return how well a checkpoint fits a base, from 0 to 1; an adapter fits or not."""
    try:
        with closing(open_expert(folder, base.index)) as expert:
            return 1.0 if expert.is_delta else _share(expert, base)
    except CheckpointError:
        return 0.0


def _share(expert: Expert, base: Base) -> float:
    """Return the share of tensors of one name and shape, by numbers of the larger of both."""
    entries, own = base.index.entries, expert.entries
    theirs = sum(entry.numel for entry in (*own.values(), *expert.extra.values()))
    total = max(sum(entry.numel for entry in entries.values()), theirs)
    met = sum(e.numel for n, e in entries.items() if n in own and own[n].shape == e.shape)
    return met / total if total else 0.0


def _differences(expert: Expert, base: Base) -> Iterator[Finding]:
    """Yield tensors that one side lacks, or has in another shape."""
    entries = base.index.entries
    reshaped = [n for n, e in expert.entries.items() if e.shape != entries[n].shape]
    heads = [n for n in reshaped if is_output_layer(n)]
    body = [n for n in reshaped if n not in heads]
    if body:
        pairs = [f"{n} {list(expert.entries[n].shape)} for {list(entries[n].shape)}" for n in body]
        yield Note("other_shapes", tuple(pairs), {"base": base.path}, "warning")
    if heads:
        yield Note("other_heads", tuple(heads), {"base": base.path})
    if expert.is_delta:
        acting = expert.factored.keys() | expert.changes.keys()
        changed = len(acting | (expert.stored.keys() - expert.extra.keys()))
        level = "note" if changed else "warning"
        yield Note("adapter_fits", (base.path,), {"count": changed}, level)
    lacking = [n for n in expert.missing if not _is_loose(n, len(entries[n].shape))]
    if lacking:
        yield Note("lacks_of_base", tuple(lacking), {"base": base.path}, "warning")
    extra = [n for n in expert.extra if n not in expert.tied]
    loose = [n for n in extra if _is_loose(n, len(expert.extra[n].shape))]
    if heads_too := [n for n in loose if is_output_layer(n)]:
        yield Note("further_heads", tuple(heads_too), {"base": base.path})
    if strange := [n for n in extra if n not in loose]:
        yield Note("lacked_by_base", tuple(strange), {"base": base.path}, "warning")


def _is_loose(name: str, axes: int) -> bool:
    """Tell whether a tensor may be there or not: a head, or what a model computes itself."""
    return is_output_layer(name) or is_buffer(name, axes)


def _tokens(tokens: Tokens | None, base: Base) -> Iterator[Finding]:
    """Yield tokens that have another id than in the base."""
    if tokens is None or base.tokens is None:
        return
    theirs = base.tokens.rows
    moved = [t for t, number in tokens.rows.items() if theirs.get(t, number) != number]
    if moved:
        shown = tuple(f"{t!r} ({tokens.rows[t]}, {theirs[t]} there)" for t in moved[:8])
        yield Note("other_ids", (few(shown),), {"count": len(moved), "base": base.path}, "warning")
