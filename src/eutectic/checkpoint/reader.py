"""Flat ranges of tensors, read from many threads at once, and a cheap identity of their content."""

from __future__ import annotations

import errno
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from eutectic.checkpoint.index import CheckpointIndex, TensorEntry
from eutectic.checkpoint.pickles import PickleTable, check_dense, read_pickle
from eutectic.errors import CheckpointError, Note
from eutectic.storage import OpenedFile, storage_of

_WINDOW_BYTES = 4096
_SAMPLE_WIDTH = 8
_SAMPLE_TOLERANCE = 1e-6  # of float32: an adapter's weight is computed, not stored


def sampled_fingerprint(
    entries: Mapping[str, TensorEntry], read: Callable[[str, int, int], Tensor]
) -> str:
    """Return a SHA-256 over names, types, shapes and samples of the data.

    Up to three windows of 4 KiB (start, middle, end) of every tensor are hashed, in the order of
    names: two checkpoints with equal fingerprints are the same for every practical purpose, but an
    edit confined to the unsampled inside of a tensor goes unseen. Sharding, file format and
    order do not matter. Cost: three small reads per tensor.
    """
    digest = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\0".encode())
        for start, stop in _sampled(entry):
            digest.update(read(name, start, stop).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sampled(entry: TensorEntry) -> list[tuple[int, int]]:
    width = _WINDOW_BYTES // entry.dtype.itemsize
    return _windows(entry.numel, width, range(3), 2)


def _windows(count: int, width: int, places: range, parts: int) -> list[tuple[int, int]]:
    """Return ranges at `places` of `parts` of a tensor's length, or all of it where it is short."""
    if count <= len(places) * width:
        return [(0, count)]
    starts = [place * (count - width) // parts for place in places]
    return [(start, start + width) for start in starts]


def sample_ranges(count: int) -> list[tuple[int, int]]:
    """Return the few flat ranges of a tensor of `count` elements that a sample holds."""
    return _windows(count, _SAMPLE_WIDTH, range(1, 3), 3)


def sample_of(weight: Tensor) -> Tensor:
    """Return a few values of a tensor, 1-D, on the CPU."""
    flat = weight.detach().reshape(-1)
    return torch.cat([flat[start:stop] for start, stop in sample_ranges(len(flat))]).cpu()


def same_content(first: Tensor, second: Tensor) -> bool:
    """Tell whether two samples of a tensor's content can come from one tensor.

    They are compared in the coarser of their dtypes, so that a copy in half precision counts as
    the same and a fine-tune does not.
    """
    if first.shape != second.shape:
        return False
    coarse = max((first.dtype, second.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    x, y = first.to(coarse).double(), second.to(coarse).double()
    if torch.finfo(coarse).eps > torch.finfo(torch.float32).eps:
        return bool(x.nan_to_num().equal(y.nan_to_num()))
    largest = float(x.nan_to_num().abs().max()) if x.numel() else 0.0
    slack = _SAMPLE_TOLERANCE * largest
    return torch.allclose(x, y, rtol=_SAMPLE_TOLERANCE, atol=slack, equal_nan=True)


# Checkpoints of hundreds of shards, times many experts, would exhaust the usual limit of 1024 open
# files: so many per folder, and together no more than half of what the system allows.
_MAX_OPEN_FILES = 16
_USUAL_LIMIT = 512  # where the system does not say, such as on Windows
_MOST_WHOLE = 4  # tensors of torch pickles that are held whole between reads of their parts


class TensorSource(Protocol):
    """Tensors that are read in flat ranges, from many threads at once."""

    is_delta: bool
    notes: tuple[Note, ...]  # what a user should know of how they are read

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """The tensors by name, in the order of files and of offsets in them."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of the flattened tensor: 1-D, its dtype, own memory."""
        ...

    def fingerprint(self) -> str:
        """Return an identity of the content."""
        ...

    def identity(self) -> list[tuple[str, int, int]]:
        """Return (name, bytes, mtime in ns) of every file that they lie in."""
        ...

    def close(self) -> None:
        """Release files."""


class CheckpointSource(TensorSource, Protocol):
    """Tensors of a checkpoint in files, and the table that lists them."""

    index: CheckpointIndex

    def __enter__(self) -> CheckpointSource:
        """Return itself."""
        ...

    def __exit__(self, *_: object) -> None:
        """Release files."""


class CheckpointReader:
    """Reads the tensors of one checkpoint; safe to share between threads.

    Safetensors are read by positioned reads straight into the tensors' memory, so that nothing
    beyond the requested range becomes resident. So are torch pickles, but for tensors that are
    packed or do not lie in a row.
    """

    is_delta = False

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self.notes: tuple[Note, ...] = index.notes
        self.entries: Mapping[str, TensorEntry] = index.entries
        self._files = _OpenFiles(index.folder)
        self._pickles: dict[str, PickleTable] = {}
        self._whole: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of the flattened tensor: 1-D, its dtype, memory of its own.

        CheckpointError where there is none, or the file ends early or changed while being read.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.index.folder}: has no tensor '{name}'.")
        stop = entry.numel if stop is None else stop
        if not 0 <= start <= stop <= entry.numel:
            raise ValueError(f"'{name}': range {start}:{stop} outside 0:{entry.numel}")
        if entry.offset < 0:
            key = name.removeprefix(self.index.module_of(entry.file).prefix)
            return self._from_pickle(entry.file, key)[start:stop].clone()
        width = entry.dtype.itemsize
        buffer = torch.empty((stop - start) * width, dtype=torch.uint8)
        try:
            self._files.read_into(entry.file, buffer.numpy().data, entry.offset + start * width)
        except OSError as error:
            why, where = error.strerror or error, self.index.folder / entry.file
            raise CheckpointError(f"{where}: '{name}' cannot be read ({why}).") from error
        if entry.dtype is torch.bool and bool((buffer > 1).any()):
            raise CheckpointError(
                f"{self.index.folder / entry.file}: '{name}' is boolean but holds other bytes than "
                "0 and 1.\nDownload or save the file again."
            )
        return buffer.view(entry.dtype)

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Be told of (tensor, start, stop) that are about to be read.

        An object store is asked for neighbours at once, and for many side by side.
        """
        found: dict[str, list[tuple[int, int]]] = {}
        for name, start, stop in ranges:
            entry = self.entries[name]
            if entry.offset >= 0:
                width, begin = entry.dtype.itemsize, entry.offset
                place = (begin + start * width, begin + stop * width)
                found.setdefault(entry.file, []).append(place)
        for file, places in found.items():
            # What fails is told where it is read.
            with suppress(OSError):
                self._files.expect(file, places)

    def fingerprint(self) -> str:
        """Return the sampled identity of the content; see `content.sampled_fingerprint`."""
        self.expect([(n, *r) for n, e in self.entries.items() for r in _sampled(e)])
        return sampled_fingerprint(self.entries, self.read)

    def identity(self) -> list[tuple[str, int, int]]:
        """Return (name, bytes, mtime in ns) of every file that the checkpoint consists of."""
        return file_identity(
            self.index.folder, [*self.index.weight_files, *self.index.config_files]
        )

    def close(self) -> None:
        """Close all files; reading afterwards opens them again."""
        self._files.close()
        with self._lock:
            self._pickles.clear()
            self._whole.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _from_pickle(self, file: str, key: str) -> Tensor:
        """Return a tensor whose numbers do not lie in a row, or are packed: as a whole."""
        with self._lock:
            # Kept for a while, or every chunk would read the whole of it.
            kept = self._whole.pop((file, key), None)
            if kept is None:
                if file not in self._pickles:
                    self._pickles[file] = read_pickle(self.index.folder / file)
                kept = self._pickles[file].read(key)
            self._whole[file, key] = kept
            while len(self._whole) > _MOST_WHOLE:
                self._whole.popitem(last=False)
            return kept


def expect(source: object, ranges: Iterable[tuple[str, int, int]]) -> None:
    """Tell a reader of files of (tensor, start, stop) that are about to be read; others nothing."""
    if isinstance(source, CheckpointReader):
        source.expect(r for r in ranges if r[0] in source.entries)


class _OpenFiles:
    """Files opened on demand; the least recently used idle one is closed when many are open."""

    _all: ClassVar[WeakSet[_OpenFiles]] = WeakSet()

    def __init__(self, folder: Path) -> None:
        self._all.add(self)
        self._folder = folder
        self._lock = threading.Lock()
        self._idle: OrderedDict[str, OpenedFile] = OrderedDict()
        self._busy: dict[str, tuple[OpenedFile, int]] = {}
        self._seen: dict[str, Hashable] = {}

    def read_into(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes of file `name` from `offset` on.

        OSError where it cannot be read, ends early, or is another one than before.
        """
        with self._using(name) as file:
            file.read_into(buffer, offset)

    def expect(self, name: str, ranges: Sequence[tuple[int, int]]) -> None:
        """Be told of ranges that are about to be read."""
        with self._using(name) as file:
            file.expect(ranges)

    @contextmanager
    def _using(self, name: str) -> Iterator[OpenedFile]:
        with self._lock:
            if name in self._busy:
                file, users = self._busy[name]
            else:
                file, users = self._idle.pop(name, None) or self._open(name), 0
            self._busy[name] = (file, users + 1)
        try:
            yield file
        finally:
            most = min(_MAX_OPEN_FILES, _allowed_files() // 2 // max(1, len(self._all)))
            with self._lock:
                file, users = self._busy.pop(name)
                if users > 1:
                    self._busy[name] = (file, users - 1)
                else:
                    self._idle[name] = file
                    while self._idle and len(self._idle) + len(self._busy) > most:
                        self._idle.popitem(last=False)[1].close()

    def close(self) -> None:
        """Close every file that nobody is reading; reading opens them again."""
        with self._lock:
            while self._idle:
                self._idle.popitem()[1].close()

    def _open(self, name: str) -> OpenedFile:
        file = storage_of(self._folder).open(self._folder / name)
        if self._seen.setdefault(name, file.stamp) != file.stamp:
            file.close()
            raise OSError(errno.ESTALE, "the file was replaced or changed while being read")
        return file


@cache
def _allowed_files() -> int:
    """Return how many files a process may hold open."""
    try:
        import resource
    except ImportError:
        return _USUAL_LIMIT
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return allowed if 0 < allowed < 1 << 20 else 1 << 20


class StateDictReader:
    """A state dict with the surface of `CheckpointReader`.

    Contiguous tensors are not copied until they are read; tied tensors and views are fine.
    """

    is_delta = False
    notes: tuple[Note, ...] = ()

    def __init__(self, state_dict: Mapping[str, Any], label: str = "the state dict") -> None:
        """Take a state dict of dense tensors; `label` names it in messages."""
        self.label = label
        self._tensors: dict[str, Tensor] = {}
        for name, value in state_dict.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{label}: '{name}' is not a tensor but {type(value).__name__}.\n"
                    "Pass model.state_dict(), without optimizer or other state."
                )
            # Once here, or every chunk of a strided tensor would copy the whole of it.
            self._tensors[str(name)] = check_dense(value, str(name), label).contiguous()
        if not self._tensors:
            raise CheckpointError(f"{label}: holds no tensors.")
        self.entries: Mapping[str, TensorEntry] = {
            name: TensorEntry(name, t.dtype, tuple(t.shape), "", -1, t.numel() * t.element_size())
            for name, t in self._tensors.items()
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of the flattened tensor: 1-D, its dtype, a CPU copy."""
        if name not in self._tensors:
            raise CheckpointError(f"{self.label}: has no tensor '{name}'.")
        return self._tensors[name].view(-1)[start:stop].to("cpu", copy=True)

    def fingerprint(self) -> str:
        """Return the sampled identity of the content; equal to that of a saved copy."""
        return sampled_fingerprint(self.entries, self.read)

    def identity(self) -> list[tuple[str, int, int]]:
        """Return no files."""
        return []

    def close(self) -> None:
        """Do nothing; the tensors belong to the caller."""


def file_identity(folder: Path, names: list[str]) -> list[tuple[str, int, int]]:
    """Return (name, bytes, mtime in ns) of those files in `folder` that exist, links followed."""
    found = storage_of(folder).identities(folder, names)
    return [(name, *found[name]) for name in names if name in found]
