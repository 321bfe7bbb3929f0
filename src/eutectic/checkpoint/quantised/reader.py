"""A quantised checkpoint under its logical tensors: ranges are computed when they are read."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from eutectic.checkpoint.index import CheckpointIndex, TensorEntry
from eutectic.checkpoint.quantised.codes import Codes
from eutectic.checkpoint.quantised.recognition import Recognised, without_quantisation
from eutectic.checkpoint.reader import CheckpointReader, TensorSource
from eutectic.errors import CheckpointError, Note

_KEPT_BYTES = 64 << 20  # of computed bands, beyond those that are being read


class QuantisedTensors:
    """Logical tensors of a checkpoint, on disk or in memory, some of which are stored as codes.

    Safe to share between threads. Codes in the tensor's own order are computed for just the range
    that is read; where the file has another order, a band of rows is computed at once and the
    last few bands are kept, of `_KEPT_BYTES` at most.
    """

    is_delta = False

    def __init__(self, source: TensorSource, found: Recognised, where: str) -> None:
        self._source = source
        self._codes = found.codes
        self._where = where
        self._bands = _Bands()
        self.notes: tuple[Note, ...] = (*source.notes, *found.notes)
        anchors = {codes.anchor: codes.entry for codes in found.codes.values()}
        listed = (anchors.get(n, e) for n, e in source.entries.items() if n not in found.hidden)
        self.entries: Mapping[str, TensorEntry] = {entry.name: entry for entry in listed}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of the flattened tensor: 1-D, its dtype, memory of its own.

        CheckpointError where there is none, or the file ends early or changed while being read.
        """
        codes = self._codes.get(name)
        if codes is None:
            if name not in self.entries:
                raise CheckpointError(f"{self._where}: has no tensor '{name}'.")
            return self._source.read(name, start, stop)
        length = codes.entry.numel
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(f"'{name}': range {start}:{stop} outside 0:{length}")
        if not codes.band:
            return codes.decode(self._source.read, start, stop)
        values = torch.empty(stop - start, dtype=codes.entry.dtype)
        for first in range(start // codes.band * codes.band, stop, codes.band):
            band = self._band(codes, first, min(first + codes.band, length))
            lower, upper = max(first, start), min(first + codes.band, stop)
            values[lower - start : upper - start] = band[lower - first : upper - first]
        return values

    def fingerprint(self) -> str:
        """Return the sampled identity of the stored bytes, and of what they are taken for.

        Of stored bytes, because scales then count too, of which values show some only.
        """
        digest = hashlib.sha256(self._source.fingerprint().encode())
        for name, codes in sorted(self._codes.items()):
            own = (name, codes.kind, codes.entry.dtype, codes.entry.shape, codes.settings)
            digest.update(repr(own).encode())
        return digest.hexdigest()

    def identity(self) -> list[tuple[str, int, int]]:
        """Return (name, bytes, mtime in ns) of every file that the checkpoint consists of."""
        return self._source.identity()

    def close(self) -> None:
        """Close all files and forget what was computed; reading afterwards opens them again."""
        self._bands.clear()
        self._source.close()

    def _band(self, codes: Codes, first: int, last: int) -> Tensor:
        key = (codes.entry.name, first)
        band = self._bands.get(key)
        if band is None:
            band = codes.decode(self._source.read, first, last)
            self._bands.keep(key, band)
        return band


class QuantisedReader(QuantisedTensors):
    """A checkpoint in files with the surface of `CheckpointReader`."""

    def __init__(self, source: CheckpointReader, found: Recognised) -> None:
        super().__init__(source, found, str(source.index.folder))
        config = without_quantisation(source.index.config)
        self.index: CheckpointIndex = replace(source.index, entries=self.entries, config=config)

    def __enter__(self) -> QuantisedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Bands:
    """The bands that were computed last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[str, int]) -> Tensor | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def keep(self, key: tuple[str, int], band: Tensor) -> None:
        with self._lock:
            if key in self._kept or band.nbytes > _KEPT_BYTES:
                return
            self._kept[key] = band
            self._bytes += band.nbytes
            while self._bytes > _KEPT_BYTES:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._bytes = 0
