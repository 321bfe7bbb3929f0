"""One fine-tuned model, a full checkpoint or an adapter, seen under the base's names."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.arranged import Arranged
from eutectic.checkpoint.changes import BaseWeights, Change
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.meeting import meet
from eutectic.checkpoint.names import Alignment
from eutectic.checkpoint.reader import TensorSource, expect, file_identity
from eutectic.checkpoint.weight_files import ADAPTER_CONFIG as ADAPTER_CONFIG
from eutectic.conventions import lora_factor, original_llama_key
from eutectic.conventions_names import without_adapter_name
from eutectic.errors import CheckpointError


@dataclass(frozen=True)
class Factors:
    """Where a change scaling·B·A is stored; `transposed` where the base keeps `[in, out]`."""

    a: TensorEntry
    b: TensorEntry
    scaling: float
    transposed: bool


@dataclass(eq=False)
class Expert:
    """One fine-tuned model as the engine sees it; its tensors go by the base's names.

    `entries` are the tensors that the base has too, with the expert's own dtype and shape; of an
    adapter, those that it changes or replaces.
    """

    label: str  # what messages call it
    source: TensorSource
    alignment: Alignment
    entries: Mapping[str, TensorEntry]
    extra: Mapping[str, TensorEntry]  # tensors that the base lacks
    stored: Mapping[str, TensorEntry]  # tensors that `source` holds in full, `extra` included
    factored: Mapping[str, Factors] = field(default_factory=dict[str, Factors])
    changes: Mapping[str, Change] = field(default_factory=dict[str, Change])  # of other forms
    # tensors of `extra` that it changes -> what they are tied to in the base, whose file lacks them
    tied: Mapping[str, str] = field(default_factory=dict[str, str])
    missing: tuple[str, ...] = ()  # tensors of the base; of an adapter none, they are unchanged
    is_delta: bool = False  # it stores differences from the base
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])  # its own, or an adapter's
    folder: Path | None = None  # None in memory
    base_weights: BaseWeights | None = None  # which some changes are computed from

    def delta(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        base: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return elements [start, stop) of W_t − W₀, 1-D in `dtype`, in the base's order.

        `base` holds the same range of the base in `dtype`; it is not modified. Zero where an
        adapter does not act. Of a product, only the rows that the range touches are formed:
        O(r·(stop − start)) operations.
        """
        if name in self.changes:
            last = start + base.numel() if stop is None else stop
            return self.changes[name].delta(start, last, base, dtype)
        if self.is_delta and name not in self.stored and name not in self.factored:
            return torch.zeros_like(base, dtype=dtype)
        product = None
        if name in self.factored:
            product = self._product(name, start, stop, dtype)
            if name not in self.stored:
                return product
        # `_read` returns memory of its own, so the arithmetic may happen in place.
        values = self._read(name, start, stop).to(dtype)
        if values.shape != base.shape:
            raise CheckpointError(
                f"{self.label}: '{name}' has the shape {list(self.stored[name].shape)}, which "
                "differs from the base's; it has no difference from it."
            )
        values.sub_(base)
        return values if product is None else values.add_(product)

    def weight(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        base: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return elements [start, stop) of W_t, 1-D in `dtype`.

        `base` holds the same range of the base in `dtype`; only changes of an adapter need it.
        """
        if not self.is_delta or (name in self.stored and name not in self.factored):
            return self._read(name, start, stop).to(dtype)
        if base is None:
            raise ValueError(f"'{name}': an adapter's weight needs the base")
        return base + self.delta(name, start, stop, base=base, dtype=dtype)

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Be told of (tensor, start, stop) of stored tensors that are about to be read."""
        known = [(self.stored[n].name, a, b) for n, a, b in ranges if n in self.stored]
        expect(self.source, known)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements of a full tensor as stored, 1-D in the file's dtype."""
        if self.is_delta and (name not in self.stored or name in self.factored):
            raise CheckpointError(f"{self.label}: does not store '{name}' in full.")
        return self._read(name, start, stop)

    def read_extra(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements of a tensor in `extra`, 1-D in the file's dtype."""
        if name not in self.extra or self.acts_on(name):
            raise CheckpointError(f"{self.label}: has no extra tensor '{name}'.")
        return self.source.read(self.extra[name].name, start, stop)

    def factors(
        self, name: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor] | None:
        """Return (L, R) with Δ_t = L·R in the base's layout, or None where Δ_t is not stored so.

        For a linear layer L = scaling·B `[out, r]` and R = A `[r, in]`; for `Conv1D` and
        embeddings, whose rows are the inputs, L = Aᵀ and R = scaling·Bᵀ; for convolutions R is
        `[r, in·k·k]`. None also where a tensor stored in full adds to the change.
        """
        if name not in self.factored or name in self.stored:
            return None
        return self._factors(name, dtype)

    def acts_on(self, name: str) -> bool:
        """Tell whether an adapter changes a tensor, rather than replacing it or nothing."""
        return name in self.factored or name in self.changes

    def inner_rank(self, name: str) -> int | None:
        """Return the inner size of the products that a change is; None where it is none.

        Of a stack, the largest of its matrices'.
        """
        if name in self.stored:
            return None
        if name in self.factored:
            return self.factored[name].a.shape[0]
        change = self.changes.get(name)
        return None if change is None else change.inner_rank

    def held_bytes(self, name: str | None) -> int:
        """Return the bytes that reading the change of a tensor holds beside what it returns."""
        change = self.changes.get(name or "")
        return 0 if change is None else change.held_bytes

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the two factors as the file holds them, A and B, without the scaling."""
        found = self.factored[name]
        return self.source.read(found.a.name), self.source.read(found.b.name)

    def input_rows(self, name: str) -> Tensor | None:
        """Return A `[r, in]` of the linear map, without the scaling; None where Δ_t is no product.

        The inputs of a layer reach its change through these rows alone.
        """
        if name not in self.factored or name in self.stored:
            return None
        a = self.factored[name].a
        return self.source.read(a.name).view(a.shape[0], -1)

    def fingerprint(self) -> str:
        """Return the sampled identity of the content, of an adapter with its configuration."""
        content = self.source.fingerprint()
        if not self.is_delta:
            return content
        text = json.dumps(self.config, sort_keys=True) + content
        return hashlib.sha256(text.encode()).hexdigest()

    def identity(self) -> list[tuple[str, int, int]]:
        """Return (file, bytes, mtime in ns) of every file read."""
        if not self.is_delta:
            return self.source.identity()
        files = {entry.file for entry in self.source.entries.values()}
        return file_identity(Path(self.label), [ADAPTER_CONFIG, *files])

    def close(self) -> None:
        """Release files."""
        self.source.close()
        if self.base_weights is not None:
            self.base_weights.close()

    @property
    def trained_on(self) -> str | None:
        """What an adapter's configuration says of its base: a path or hub id; None if nothing."""
        named = self.config.get("base_model_name_or_path") if self.is_delta else None
        return named if isinstance(named, str) and named else None

    def _read(self, name: str, start: int, stop: int | None) -> Tensor:
        if name not in self.stored:
            raise CheckpointError(f"{self.label}: has no tensor '{name}'.")
        return self.source.read(self.stored[name].name, start, stop)

    def _factors(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        found = self.factored[name]
        rank = found.a.shape[0]
        a = self.source.read(found.a.name).to(dtype).view(rank, -1)
        b = self.source.read(found.b.name).to(dtype).view(-1, rank).mul_(found.scaling)
        return (a.T, b.T) if found.transposed else (b, a)

    def _product(self, name: str, start: int, stop: int | None, dtype: torch.dtype) -> Tensor:
        left, right = self._factors(name, dtype)
        columns = right.shape[1]
        stop = left.shape[0] * columns if stop is None else stop
        if start >= stop or columns == 0:
            return torch.zeros(0, dtype=dtype)
        first, last = start // columns, -(-stop // columns)
        rows = (left[first:last] @ right).view(-1)
        return rows[start - first * columns : stop - first * columns]


def as_expert(source: TensorSource, label: str, config: Mapping[str, Any]) -> Expert:
    """Return a checkpoint as an expert under its own names."""
    return Expert(
        label, source, Alignment(), source.entries, {}, stored=source.entries, config=config
    )


def full_expert(
    source: TensorSource,
    base: Mapping[str, TensorEntry],
    label: str,
    config: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    base_config: Mapping[str, Any] | None = None,
) -> Expert:
    """Return a complete fine-tuned checkpoint, on disk or in memory, aligned to the base.

    Tensors that the base keeps in another layout are put together as the base has them.
    """
    own = source.entries
    met = meet(source, base, label, (base_config or {}, config or {}))
    keys = {name: key for key, name in met.mapping.items()}
    if met.views:
        source = Arranged(source, met.views, {name: base[name].shape for name in met.views})
        keys.update((name, name) for name in met.views)
    if not keys:
        shown = ", ".join(list(own)[:3])
        if any(map(original_llama_key, own)) and not any(map(original_llama_key, base)):
            raise CheckpointError(
                f"{label}: the original format of Llama or Mistral, whose names are not the base's "
                f"({shown} …).\nName the same model in the format of transformers."
            )
        raise CheckpointError(
            f"{label}: shares no tensor with the base; it is a fine-tune of another model.\n"
            f"Its tensors: {shown} …; the base's: {', '.join(list(base)[:3])} …"
        )
    entries = own
    if met.views or not _as_they_are(base, own, keys):
        entries = {name: source.entries[keys[name]] for name in base if name in keys}
    _check_no_factors(met.rest, label)
    extra = {name: own[key] for key, name in met.rest.items()}
    return Expert(
        label,
        source,
        met.alignment,
        entries,
        extra,
        stored={**extra, **entries} if extra else entries,
        missing=tuple(name for name in base if name not in keys),
        config=config or {},
        folder=folder,
    )


def _as_they_are(
    base: Mapping[str, TensorEntry], own: Mapping[str, TensorEntry], keys: Mapping[str, str]
) -> bool:
    """Tell whether all names of the base are an expert's own, in the same order."""
    if not len(base) == len(own) == len(keys):
        return False
    return all(n == k and keys.get(n) == k for n, k in zip(base, own, strict=True))


def _check_no_factors(keys: Iterable[str], label: str) -> None:
    """Refuse a model that was saved whole with an adapter's factors still apart."""
    factors = [key for key in keys if lora_factor(without_adapter_name(key))]
    if factors:
        raise CheckpointError(
            f"{label}: holds {len(factors)} factors of a LoRA adapter beside the weights, such as "
            f"'{factors[0]}'; its change would be lost.\n"
            "Merge the adapter with peft (merge_and_unload) and save that, or save the adapter "
            "alone (save_pretrained of the PEFT model) and name its folder."
        )
