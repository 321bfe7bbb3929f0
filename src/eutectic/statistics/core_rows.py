"""Input statistics that adapters alone can use: what their own rows see of the inputs.

A merge of adapters Δ_t = B_tA_t meets inputs only through the rows of all A_t. So of a layer's
Gram XᵀX `[in, in]` it is enough to keep A·XᵀX·Aᵀ `[R, R]`, with A `[R, in]` the rows of all
adapters one above the other: megabytes in place of gigabytes. `core_view` reads it in a merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.checkpoint.experts import Expert, open_expert
from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.names import align
from eutectic.errors import RequestError
from eutectic.models.names import names_in, saved_names
from eutectic.models.sites import find_sites
from eutectic.storage import view_once
from eutectic.words import few


@dataclass(frozen=True, eq=False)
class CoreRows:
    """The rows of several adapters of one base, by the parameters of a model.

    Attributes:
        rows: parameter -> A `[R, in]`, R = Σ r_t, in the order of the adapters.
        ranks: parameter -> r_t of each adapter, 0 where it does not act.
        base_names: parameter -> its name in the base's files.
        fingerprints: adapter -> the identity of its content.
    """

    rows: Mapping[str, Tensor]
    ranks: Mapping[str, tuple[int, ...]]
    base_names: Mapping[str, str]
    fingerprints: Mapping[str, str]

    def describe(self) -> dict[str, Any]:
        """Return what a file of statistics says of them."""
        adapters = [{"name": n, "fingerprint": f} for n, f in self.fingerprints.items()]
        ranks = {name: list(own) for name, own in self.ranks.items()}
        return {"adapters": adapters, "ranks": ranks, "base_names": dict(self.base_names)}


def core_rows(model: nn.Module, adapters: Mapping[str, str | Path], base: str | Path) -> CoreRows:
    """Return the rows of LoRA adapters for the layers of a model.

    Args:
        model: the model that will be run: the base, an expert, or the base with an adapter.
        adapters: name -> folder. Their ranks and targets may differ.
        base: the folder of the base, for the names in its files.

    Raises:
        RequestError: no adapter, or one that is none, or changes that are no thin products.
        CheckpointError: a folder that cannot be read, an adapter of another base.
    """
    index = open_index(view_once(base))
    sites = find_sites(model).found
    called = names_in(index.entries, [site.name for site in sites], saved_names(model))
    spelt = {spelling: name for name, spelling in called.items()}
    to_base, _ = align(list(index.entries), list(spelt))
    own = {name: base_name for spelling, base_name in to_base.items() if (name := spelt[spelling])}
    opened: dict[str, Expert] = {}
    try:
        for name, folder in adapters.items():
            opened[name] = open_expert(view_once(folder), index)
        _check(opened)
        rows: dict[str, Tensor] = {}
        ranks: dict[str, tuple[int, ...]] = {}
        for site in sites:
            parts = [_rows(e, own.get(site.name, ""), site.shape[1]) for e in opened.values()]
            if any(len(part) for part in parts):
                rows[site.name] = torch.cat(parts)
                ranks[site.name] = tuple(map(len, parts))
        fingerprints = {name: expert.fingerprint() for name, expert in opened.items()}
    finally:
        for expert in opened.values():
            expert.close()
    if not rows:
        raise RequestError(
            f"the adapters {few(list(adapters))} act on no linear layer of the model.\n"
            "Are they adapters of this base?"
        )
    return CoreRows(rows, ranks, {name: own[name] for name in rows}, fingerprints)


def _check(opened: Mapping[str, Expert]) -> None:
    full = [name for name, expert in opened.items() if not expert.is_delta]
    if full or not opened:
        raise RequestError(
            f"statistics for adapters are for LoRA adapters; {few(full) or 'none'} is none.\n"
            "Leave --for out: statistics of the whole inputs serve every expert."
        )
    for name, expert in opened.items():
        if expert.changes:
            raise RequestError(
                f"'{name}' changes {few(list(expert.changes))} by no thin product.\n"
                "Leave --for out: statistics of the whole inputs serve every expert."
            )


def _rows(expert: Expert, base_name: str, width: int) -> Tensor:
    """Return A `[r, in]` of one adapter, `[0, in]` where it does not act."""
    rows = expert.input_rows(base_name)
    return torch.zeros(0, width) if rows is None else rows.float()
