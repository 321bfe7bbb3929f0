"""Experts: full checkpoints and adapters behind one surface, under the base's names."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from eutectic.checkpoint.adapter_config import CONFIG_NAME
from eutectic.checkpoint.adapters import AdapterReader
from eutectic.checkpoint.content import TensorSource
from eutectic.checkpoint.ia3 import identity_adapter, is_ia3, is_identity_adapter, open_ia3
from eutectic.checkpoint.index import CheckpointIndex, TensorEntry, open_index
from eutectic.checkpoint.memory import StateDictReader
from eutectic.checkpoint.names import Alignment, align
from eutectic.checkpoint.reader import CheckpointReader
from eutectic.errors import CheckpointError

BaseReader = CheckpointReader | StateDictReader


class Expert(Protocol):
    """One fine-tuned model as the engine sees it.

    Attributes:
        label: what to call it in messages.
        entries: tensors that the base has too, by the base's name, with the expert's own dtype and
            shape (an adapter: the tensors it changes or replaces).
        extra: tensors that the base lacks, by their name in the base's scheme.
        missing: tensors of the base that the expert lacks (an adapter: none, they are unchanged).
        alignment: how its keys correspond to the base's.
        is_delta: True when it stores differences from the base.
        config: its config.json, or an adapter's adapter_config.json.
        folder: where it was read from; None in memory.
    """

    label: str
    entries: Mapping[str, TensorEntry]
    extra: Mapping[str, TensorEntry]
    missing: tuple[str, ...]
    alignment: Alignment
    is_delta: bool
    config: Mapping[str, Any]
    folder: Path | None

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
        adapter does not act.

        Raises:
            CheckpointError: the expert lacks the tensor, or it has another size than the base's.
        """
        ...

    def weight(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        base: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return elements [start, stop) of W_t, 1-D in `dtype`; only adapters need `base`.

        Raises:
            CheckpointError: the expert lacks the tensor.
        """
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements of a full tensor as stored, 1-D in the file's dtype.

        Raises:
            CheckpointError: the expert does not store this tensor in full.
        """
        ...

    def read_extra(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements of a tensor in `extra`, 1-D in the file's dtype."""
        ...

    def factors(
        self, name: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor] | None:
        """Return (L, R) with Δ_t = L·R in the base's layout, or None where Δ_t is not stored so."""
        ...

    def fingerprint(self) -> str:
        """Return the sampled identity of the content."""
        ...

    def identity(self) -> list[tuple[str, int, int]]:
        """Return (file, bytes, mtime in ns) of every file read."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


class FullExpert:
    """A complete fine-tuned checkpoint, on disk or in memory; implements `Expert`."""

    is_delta = False

    def __init__(
        self,
        source: TensorSource,
        base: Mapping[str, TensorEntry],
        *,
        label: str,
        config: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        """Align the tensors of `source` to those of the base.

        Raises:
            CheckpointError: no tensor is common to both, or the names fit in more than one way.
        """
        self.label = label
        self.config: Mapping[str, Any] = config or {}
        self.folder = folder
        self._source = source
        mapping, alignment = align(base, source.entries, expert=label)
        if not mapping:
            shown = ", ".join(list(source.entries)[:3])
            raise CheckpointError(
                f"{label}: shares no tensor with the base; it is a fine-tune of another model.\n"
                f"Its tensors: {shown} …; the base's: {', '.join(list(base)[:3])} …"
            )
        self.alignment = alignment
        self._own = {name: key for key, name in mapping.items()}
        self.entries: Mapping[str, TensorEntry] = {
            name: source.entries[self._own[name]] for name in base if name in self._own
        }
        self._own_extra = {
            alignment.to_base(key, base): key for key in source.entries if key not in mapping
        }
        self.extra: Mapping[str, TensorEntry] = {
            name: source.entries[key] for name, key in self._own_extra.items()
        }
        self.missing = tuple(name for name in base if name not in self._own)

    def delta(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        base: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return elements [start, stop) of W_t − W₀; see `Expert.delta`."""
        values = self.read(name, start, stop).to(dtype)
        if values.shape != base.shape:
            raise CheckpointError(
                f"{self.label}: '{name}' has the shape {list(self.entries[name].shape)}, which "
                "differs from the base's; it has no difference from it."
            )
        # `read` returns memory of its own, so the subtraction may happen in place.
        return values.sub_(base)

    def weight(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        base: Tensor | None = None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return elements [start, stop) of W_t in `dtype`; the base is not needed."""
        return self.read(name, start, stop).to(dtype)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) as stored."""
        if name not in self._own:
            raise CheckpointError(f"{self.label}: has no tensor '{name}'.")
        return self._source.read(self._own[name], start, stop)

    def read_extra(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements of a tensor that the base lacks."""
        if name not in self._own_extra:
            raise CheckpointError(f"{self.label}: has no extra tensor '{name}'.")
        return self._source.read(self._own_extra[name], start, stop)

    def factors(
        self, name: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor] | None:
        """Return None: a full checkpoint stores no factors."""
        return None

    def fingerprint(self) -> str:
        """Return the sampled identity of the content."""
        return self._source.fingerprint()

    def identity(self) -> list[tuple[str, int, int]]:
        """Return (file, bytes, mtime in ns) of every file read."""
        return self._source.identity()

    def close(self) -> None:
        """Release files."""
        self._source.close()


def common_base(
    base: CheckpointReader, experts: Mapping[str, Path]
) -> tuple[BaseReader, CheckpointIndex]:
    """Return what the experts' tensors are compared with, and its layout.

    The base itself; where every expert is an (IA)³ adapter, the adapter of it that changes nothing.

    Raises:
        CheckpointError: (IA)³ adapters that do not fit together, or do not fit the base.
    """
    if not experts or not all(is_ia3(path) for path in experts.values()):
        return base, base.index
    return identity_adapter({name: open_ia3(path) for name, path in experts.items()}, base)


def open_expert(path: Path, base: CheckpointIndex) -> Expert:
    """Return the expert at `path`: a checkpoint (folder or file) or a PEFT adapter folder.

    A folder with an adapter_config.json is an adapter, whatever else it holds.

    Args:
        path: of the expert.
        base: the layout that `common_base` returned.

    Raises:
        CheckpointError: it cannot be read, is of a kind that is not supported, or belongs to
            another base.
    """
    path = Path(path)
    vectors = is_identity_adapter(base) and is_ia3(path)
    if is_adapter(path) and not vectors:
        return AdapterReader(path, base.entries)
    index = open_ia3(path) if vectors else open_index(path)
    return FullExpert(
        CheckpointReader(index),
        base.entries,
        label=str(path),
        config=index.config,
        folder=path if vectors else index.folder,
    )


def expert_in_memory(
    state_dict: Mapping[str, Any], base: Mapping[str, TensorEntry], label: str
) -> Expert:
    """Return an expert made of a state dict; `base` are the entries of the base's reader."""
    return FullExpert(StateDictReader(state_dict, label), base, label=label)


def is_adapter(path: Path) -> bool:
    """Return whether `path` is a PEFT adapter folder."""
    return (path / CONFIG_NAME).is_file()


def fingerprint_of(path: Path, base: Path | None = None) -> str:
    """Return the identity of the content of a checkpoint, or of an adapter alone.

    Raises:
        CheckpointError: it cannot be read, or is an adapter of a kind that no reader understands.
    """
    if is_adapter(path) and not is_ia3(path) and base is not None:
        with closing(open_expert(path, open_index(base))) as expert:
            return expert.fingerprint()
    with CheckpointReader(open_ia3(path) if is_ia3(path) else open_index(path)) as reader:
        return reader.fingerprint()
