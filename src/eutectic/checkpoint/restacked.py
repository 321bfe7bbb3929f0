"""Checkpoints with their layers in another order: as the layers of an output are made of them.

A tensor of the output may come from any layer of any model. `Restacked` is the base of such an
output, put together from several checkpoints; `restacked` is one expert under the output's names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from eutectic.checkpoint.expert_tensors import Expert
from eutectic.checkpoint.index import TensorEntry
from eutectic.errors import Note


class Restacked:
    """Tensors of several checkpoints under the names of one output.

    Has the surface of `CheckpointReader`; safe to share between threads. Closing it closes nothing:
    the checkpoints are somebody else's.
    """

    is_delta = False
    notes: tuple[Note, ...] = ()

    def __init__(self, places: Mapping[str, tuple[Expert, str]]) -> None:
        """Show tensors by name, each as a checkpoint keeps it under its own."""
        self.places = places
        self.entries: Mapping[str, TensorEntry] = {
            name: replace(entry_of(owner, own), name=name, offset=-1)
            for name, (owner, own) in places.items()
        }
        self.owners = list({id(owner): owner for owner, _ in places.values()}.values())
        told = [note for owner in self.owners for note in owner.source.notes]
        self.notes = tuple(dict.fromkeys(told))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor, as `CheckpointReader.read`."""
        owner, own = self.places[name]
        return owner.read(own, start, stop)

    def fingerprint(self) -> str:
        """Return the sampled identity of all checkpoints, and of which tensor stands where."""
        digest = hashlib.sha256()
        for owner in self.owners:
            digest.update(owner.fingerprint().encode())
        order = {id(owner): n for n, owner in enumerate(self.owners)}
        for name, (owner, own) in sorted(self.places.items()):
            digest.update(f"{name}\0{order[id(owner)]}\0{own}\0".encode())
        return digest.hexdigest()

    def identity(self) -> list[tuple[str, int, int]]:
        """Return (file, bytes, mtime in ns) of every file read."""
        return [item for owner in self.owners for item in owner.identity()]

    def close(self) -> None:
        """Do nothing."""


def entry_of(owner: Expert, name: str) -> TensorEntry:
    """Return the table's entry of a tensor of a checkpoint, whether the base has it or not."""
    return owner.entries[name] if name in owner.entries else owner.extra[name]


def restacked(expert: Expert, names: Mapping[str, str]) -> Expert:
    """Return an expert under the names of an output: name there -> its own.

    What it lacks of these is `missing`; tensors that have no place in the output are left out.
    """
    held = {new: own for new, own in names.items() if own in expert.entries or own in expert.extra}
    return replace(
        expert,
        entries={new: replace(entry_of(expert, own), name=new) for new, own in held.items()},
        extra={},
        stored={new: expert.stored[own] for new, own in held.items() if own in expert.stored},
        factored={new: expert.factored[own] for new, own in held.items() if own in expert.factored},
        changes={new: expert.changes[own] for new, own in held.items() if own in expert.changes},
        tied={},
        missing=tuple(new for new in names if new not in held),
    )
