"""PEFT LoRA folders as experts, without peft: each Δ_t = scaling·B·A is formed when it is read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eutectic.checkpoint.adapter_config import CONFIG_NAME, LoraConfig, read_adapter_config
from eutectic.checkpoint.content import sampled_fingerprint
from eutectic.checkpoint.index import TensorEntry, open_index
from eutectic.checkpoint.names import Alignment, align, check_inside
from eutectic.checkpoint.reader import CheckpointReader, file_identity
from eutectic.conventions import PEFT_ROOT, lora_factor, unwrapped_key
from eutectic.errors import CheckpointError

WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass
class _Target:
    """Keys in the adapter's file that act on one tensor of the base."""

    full: str | None = None
    a: str | None = None
    b: str | None = None
    embedding: bool = False
    scaling: float = 1.0
    transposed: bool = False

    @property
    def keys(self) -> list[str]:
        return [key for key in (self.full, self.a, self.b) if key]


class AdapterReader:
    """A LoRA adapter seen as an expert: the tensors it changes or replaces, under the base's names.

    Linear layers, embeddings (`lora_embedding_A/B`), convolutions without groups and `Conv1D`
    (stored `[in, out]`) are understood; tensors stored in full (`modules_to_save`, trained biases,
    resized embeddings) replace the base's. Implements `experts.Expert`.
    """

    is_delta = True
    missing: tuple[str, ...] = ()

    def __init__(self, folder: Path, base: Mapping[str, TensorEntry]) -> None:
        """Read the adapter's configuration and header, and align them to the base.

        Raises:
            CheckpointError: see `adapter_config.read_adapter_config`; a factor lacks its partner;
                shapes contradict the configuration or the base; a key is not understood.
        """
        self.folder: Path | None = folder
        self.label = str(folder)
        lora = read_adapter_config(folder)
        self.config: Mapping[str, Any] = lora.raw
        name = next((n for n in WEIGHT_NAMES if (folder / n).exists()), None)
        if name is None:
            raise CheckpointError(f"{folder}: has {CONFIG_NAME} but no {WEIGHT_NAMES[0]}.")
        check_inside(folder, name)
        self._reader = CheckpointReader(open_index(folder / name))
        self._weights_name = name
        targets = self._collect(lora)
        mapping, alignment = align(base, targets, expert=self.label)
        self.alignment = alignment
        self._targets: dict[str, _Target] = {}
        self._extra: dict[str, str] = {}
        for own, target in targets.items():
            if own in mapping:
                self._targets[mapping[own]] = target
            elif target.a is None and target.full is not None:
                self._extra[alignment.to_base(own, base)] = target.full
            else:
                raise self._unknown_module(own, alignment, base)
        self._settle_orientation(lora, base)
        self.entries: Mapping[str, TensorEntry] = {
            key: self._entry(key, base[key]) for key in base if key in self._targets
        }
        self.extra: Mapping[str, TensorEntry] = {
            key: self._reader.entries[own] for key, own in self._extra.items()
        }

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

        Only the rows that the range touches are formed: O(r·(stop − start)) operations. Zero where
        the adapter does not act.

        Raises:
            CheckpointError: a tensor stored in full has another size than the base's.
        """
        target = self._targets.get(name)
        if target is None:
            return torch.zeros_like(base, dtype=dtype)
        result: Tensor | None = None
        if target.full is not None:
            result = self._reader.read(target.full, start, stop).to(dtype)
            if result.shape != base.shape:
                raise CheckpointError(
                    f"{self.label}: '{name}' has the shape {list(self.entries[name].shape)}, "
                    "which differs from the base's; it has no difference from it."
                )
            result.sub_(base)
        if target.a is not None:
            product = self._product(name, target, start, stop, dtype)
            result = product if result is None else result.add_(product)
        assert result is not None
        return result

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

        Args:
            name: the base's name of the tensor.
            start: first element.
            stop: one past the last element.
            base: the same range of the base in `dtype`; may be None for tensors stored in full.
            dtype: type to compute in.
        """
        target = self._targets.get(name)
        if target is not None and target.a is None:
            return self.read(name, start, stop).to(dtype)
        if base is None:
            raise ValueError(f"'{name}': an adapter's weight needs the base")
        return base + self.delta(name, start, stop, base=base, dtype=dtype)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements of a tensor stored in full, 1-D in the file's dtype.

        Raises:
            CheckpointError: the adapter stores no such tensor, or stores it as factors.
        """
        target = self._targets.get(name)
        if target is None or target.full is None or target.a is not None:
            raise CheckpointError(f"{self.label}: does not store '{name}' in full.")
        return self._reader.read(target.full, start, stop)

    def read_extra(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements of a tensor in `extra`, 1-D in the file's dtype."""
        if name not in self._extra:
            raise CheckpointError(f"{self.label}: has no extra tensor '{name}'.")
        return self._reader.read(self._extra[name], start, stop)

    def factors(
        self, name: str, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor] | None:
        """Return (L, R) with Δ_t = L·R, in the base tensor's layout, or None if there are none.

        For a linear layer L = scaling·B `[out, r]` and R = A `[r, in]`; for `Conv1D` and
        embeddings, whose rows are the inputs, L = Aᵀ and R = scaling·Bᵀ; for convolutions R is
        `[r, in·k·k]`. None also where a tensor stored in full adds to the change.
        """
        target = self._targets.get(name)
        if target is None or target.a is None or target.full is not None:
            return None
        return self._factors(target, dtype)

    def fingerprint(self) -> str:
        """Return a SHA-256 over the configuration and the sampled content of the tensors."""
        text = json.dumps(self.config, sort_keys=True)
        return hashlib.sha256((text + sampled_fingerprint(self._reader)).encode()).hexdigest()

    def identity(self) -> list[tuple[str, int, int]]:
        """Return (name, bytes, mtime in ns) of the adapter's files."""
        return file_identity(Path(self.label), [CONFIG_NAME, self._weights_name])

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def _collect(self, lora: LoraConfig) -> dict[str, _Target]:
        """Group the file's keys by the parameter they act on, in the adapted model's own names."""
        targets: dict[str, _Target] = {}
        for key in self._reader.entries:
            own = key.removeprefix(PEFT_ROOT)
            factor = lora_factor(own)
            if factor:
                module = factor["module"]
                target = targets.setdefault(f"{module}.weight", _Target())
                target.embedding = bool(factor["embedding"])
                target.scaling = lora.scaling(module)
                if factor["side"] == "A":
                    target.a = key
                else:
                    target.b = key
            elif "lora_" in own or "token_adapter" in own:
                raise CheckpointError(
                    f"{self.label}: the tensor '{key}' is not understood.\n"
                    "It belongs to a variant of LoRA that cannot be merged"
                    f"{' (DoRA)' if 'magnitude' in own else ''}; merge it with peft first."
                )
            else:
                targets.setdefault(unwrapped_key(own), _Target()).full = key
        for own, target in targets.items():
            if (target.a is None) != (target.b is None):
                has, lacks = ("A", "B") if target.a else ("B", "A")
                raise CheckpointError(
                    f"{self.label}: '{own}' has the factor {has} but lacks {lacks}."
                )
            if target.a and target.b:
                self._check_ranks(own.removesuffix(".weight"), target, lora)
        return targets

    def _check_ranks(self, module: str, target: _Target, lora: LoraConfig) -> None:
        a, b = self._shape(target.a), self._shape(target.b)
        if min(len(a), len(b)) < 2 or math.prod(b[2:]) != 1:
            raise CheckpointError(
                f"{self.label}: '{module}' has factors A {list(a)} and B {list(b)}; expected "
                "matrices, or kernels of which B's has size 1.\nWas the adapter saved in shards?"
            )
        if not a[0] == b[1] == lora.rank(module):
            raise CheckpointError(
                f"{self.label}: '{module}' has factors of rank {a[0]} (A) and {b[1]} (B), but "
                f"{CONFIG_NAME} gives it rank {lora.rank(module)}.\n"
                "The scaling alpha/r would be wrong; restore the matching configuration."
            )

    def _settle_orientation(self, lora: LoraConfig, base: Mapping[str, TensorEntry]) -> None:
        """Decide per tensor whether the base stores [out, in] or [in, out].

        Shapes decide; for square matrices the configuration does, or else what the adapter's
        other tensors show: all of GPT-2's `Conv1D` are stored alike.
        """
        square: list[_Target] = []
        any_transposed = False
        for name, target in self._targets.items():
            if target.a is None:
                continue
            a, b = self._shape(target.a), self._shape(target.b)
            rows, columns = b[0], math.prod(a[1:])
            shape = base[name].shape
            held = (shape[0], math.prod(shape[1:])) if shape else (0, 0)
            if held not in ((rows, columns), (columns, rows)) or (
                len(shape) > 2 and tuple(shape[1:]) != a[1:]
            ):
                raise CheckpointError(
                    f"{self.label}: the factors of '{name}' make a [{rows}, {columns}] matrix, "
                    f"the base's tensor is {list(shape)}.\nThe adapter belongs to another base."
                )
            if target.embedding:
                target.transposed = True
            elif rows == columns and len(shape) == 2:
                square.append(target)
            else:
                target.transposed = held != (rows, columns)
                any_transposed |= target.transposed
        for target in square:
            target.transposed = lora.fan_in_fan_out or any_transposed

    def _entry(self, name: str, base: TensorEntry) -> TensorEntry:
        target = self._targets[name]
        nbytes = sum(self._reader.entries[key].nbytes for key in target.keys)
        own = self._reader.entries[target.keys[0]]
        shape = base.shape if target.full is None else own.shape
        return TensorEntry(name, own.dtype, shape, own.file, -1, nbytes)

    def _shape(self, key: str | None) -> tuple[int, ...]:
        assert key is not None
        return self._reader.entries[key].shape

    def _factors(self, target: _Target, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert target.a is not None
        assert target.b is not None
        rank = self._shape(target.a)[0]
        a = self._reader.read(target.a).to(dtype).view(rank, -1)
        b = self._reader.read(target.b).to(dtype).view(-1, rank).mul_(target.scaling)
        return (a.T, b.T) if target.transposed else (b, a)

    def _product(
        self, name: str, target: _Target, start: int, stop: int | None, dtype: torch.dtype
    ) -> Tensor:
        left, right = self._factors(target, dtype)
        columns = right.shape[1]
        stop = left.shape[0] * columns if stop is None else stop
        if start >= stop or columns == 0:
            return torch.zeros(0, dtype=dtype)
        first, last = start // columns, -(-stop // columns)
        rows = (left[first:last] @ right).view(-1)
        return rows[start - first * columns : stop - first * columns]

    def _unknown_module(
        self, own: str, alignment: Alignment, base: Mapping[str, TensorEntry]
    ) -> CheckpointError:
        shown = ", ".join(list(base)[:3])
        return CheckpointError(
            f"{self.label}: acts on '{own}', which the base does not have ({alignment}).\n"
            f"The base's tensors: {shown} …\nThe adapter belongs to another base."
        )
