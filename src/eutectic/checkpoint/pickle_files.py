"""Files in torch's own formats: where their pickle and the numbers of their storages lie.

Since torch 1.6 a zip archive of `data.pkl` and one record per storage; before that pickles and
storages in a row. A storage's size is that of its record, whatever the pickle claims.
"""

import io
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from eutectic.checkpoint.odd_files import by_archive, by_content, start_of
from eutectic.checkpoint.pickle_program import Bounded, Foreign, Storage, View, described
from eutectic.errors import CheckpointError, first_line
from eutectic.storage.small_files import INDEX_BYTES, open_regular

ZIP = b"PK\x03\x04"
# Bytes of all tensors written out, beside those of the file: some are tied, few are expanded.
_MOST_TIMES, _ALWAYS_FINE = 16, 64 << 20
_LOCAL_HEADER = 30  # bytes of what stands before a record, without its name and extra field
_ENCRYPTED = 1
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # of files before torch 1.6


@dataclass(frozen=True)
class Record:
    """Where a storage lies: at `offset` of the file, or packed in an archive under `packed`."""

    offset: int
    nbytes: int
    packed: str = ""


@dataclass(frozen=True)
class PickleFile:
    """A file in one of torch's formats."""

    path: Path
    size: int
    content: Any  # what its pickle describes
    records: Mapping[str, Record]  # by the key of the storage

    def offset(self, view: View) -> int:
        """Return where a tensor's numbers lie in the file, −1 where they do not lie in a row."""
        record = self._record(view.storage)
        if record.packed or not _in_a_row(view):
            return -1
        return record.offset + view.offset * view.dtype.itemsize

    def read(self, view: View) -> Tensor:
        """Return a tensor's elements, 1-D, in memory of their own."""
        if not view.numel():
            return torch.empty(0, dtype=view.dtype)
        record, width = self._record(view.storage), view.dtype.itemsize
        steps = zip(view.shape, view.stride, strict=True)
        start = view.offset * width
        count = (1 + sum((size - 1) * step for size, step in steps)) * width
        with _told(self.path):
            if record.packed:
                with _open(self.path) as file, zipfile.ZipFile(file) as archive:
                    raw = archive.read(record.packed)[start : start + count]
            else:
                with _open(self.path) as file:
                    file.seek(record.offset + start)
                    raw = file.read(count)
            if len(raw) != count:
                raise ValueError("the file ends early; it changed since it was opened")
        values = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(view.dtype)
        return values.as_strided(view.shape, view.stride).reshape(-1).clone()

    def check_sizes(self, views: Iterable[View]) -> None:
        """Refuse tensors that reach beyond their records, or take far more than the file has."""
        total = 0
        with _told(self.path):
            for view in views:
                if view.numel() and view.storage.nbytes > self._record(view.storage).nbytes:
                    raise ValueError(
                        f"a storage claims {view.storage.nbytes:,} bytes, its record has "
                        f"{self._record(view.storage).nbytes:,}"
                    )
                total += view.numel() * view.dtype.itemsize
            packed = sum(r.nbytes for r in self.records.values() if r.packed)
            most = _MOST_TIMES * self.size + _ALWAYS_FINE
            if max(total, packed) > most:
                raise ValueError(
                    f"its tensors take {max(total, packed):,} bytes when they are written out, the "
                    f"limit for a file of {self.size:,} is {most:,}"
                )

    def _record(self, storage: Storage) -> Record:
        found = self.records.get(storage.key)
        if found is None:
            if storage.numel:
                raise _damaged(self.path, f"the storage '{storage.key[:40]}' is missing")
            return Record(0, 0)
        return found


def _in_a_row(view: View) -> bool:
    step = 1
    for size, own in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size != 1 and own != step:
            return not view.numel()
        step *= size
    return True


def opened(path: Path) -> PickleFile:
    """Return what a file describes, and where its storages lie; numbers are not read."""
    with _told(path):
        start = start_of(path)
        if not start.startswith(ZIP) and (odd := by_content(path, start)) is not None:
            raise odd.error(path)
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            return (_from_archive if start.startswith(ZIP) else _from_row)(path, file, size)


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    with os.fdopen(open_regular(path), "rb") as file:
        yield cast(BinaryIO, file)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn whatever a hostile or damaged file makes of reading it into an error that names it."""
    try:
        yield
    except Foreign as error:
        raise CheckpointError(
            f"{path}: damaged, or holds code besides tensors; it was refused and nothing was run.\n"
            f"Its pickle names {error}, of which no table of tensors is made.\n"
            "Load it where you trust it, and save its state_dict() as safetensors."
        ) from error
    except (CheckpointError, MemoryError):
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:
        raise _damaged(path, first_line(error)) from error


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: damaged, or not a checkpoint of torch ({what[:300]}).\n"
        "Download or save the file again."
    )


# --- A zip archive ---


def _from_archive(path: Path, file: BinaryIO, size: int) -> PickleFile:
    with zipfile.ZipFile(file) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        if (odd := by_archive(path, list(infos))) is not None:
            raise odd.error(path)
        main = next(name for name in infos if name.rpartition("/")[2] == "data.pkl")
        folder = main.removesuffix("data.pkl")
        if f"{folder}byteorder" in infos:
            order = _small(archive, infos[f"{folder}byteorder"], 100)
            if order.strip() == b"big":
                raise ValueError("its numbers are big-endian, which is not supported")
        content = described(_small(archive, infos[main], INDEX_BYTES))
        inside = f"{folder}data/"
        records = {
            name.removeprefix(inside): _record_of(file, info, size)
            for name, info in infos.items()
            if name.startswith(inside)
        }
    return PickleFile(path, size, content, records)


def _small(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    """Return a record that is read whole."""
    _check_packing(info)
    if info.file_size > limit:
        what = f"'{info.filename[-40:]}' has {info.file_size:,} bytes, the limit is {limit:,}"
        raise ValueError(what)
    return archive.read(info)


def _check_packing(info: zipfile.ZipInfo) -> None:
    if info.flag_bits & _ENCRYPTED:
        raise ValueError(f"'{info.filename[-40:]}' is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"'{info.filename[-40:]}' is packed by a method that torch does not know")


def _record_of(file: BinaryIO, info: zipfile.ZipInfo, size: int) -> Record:
    _check_packing(info)
    if info.compress_type != zipfile.ZIP_STORED:
        return Record(-1, info.file_size, info.filename)
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) != _LOCAL_HEADER or not header.startswith(ZIP):
        raise ValueError(f"'{info.filename[-40:]}' is not where the archive says")
    lengths = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    offset = info.header_offset + _LOCAL_HEADER + sum(lengths)
    if info.file_size != info.compress_size or offset + info.file_size > size:
        raise ValueError(f"'{info.filename[-40:]}' reaches beyond the file")
    return Record(offset, info.file_size)


# --- Pickles and storages in a row ---


def _from_row(path: Path, file: BinaryIO, size: int) -> PickleFile:
    found: list[Storage] = []
    # Of each pickle no more is read than it has: storages follow.
    parts = (described(Bounded(file, INDEX_BYTES), found) for _ in range(5))
    magic, version, system, content, keys = parts
    if magic != _MAGIC or version != _VERSION or not isinstance(keys, list):
        raise ValueError("it does not begin as torch's files do")
    if isinstance(system, Mapping) and system.get("little_endian") is False:
        raise ValueError("its numbers are big-endian, which is not supported")
    widths = {s.key: 1 if s.dtype is None else s.dtype.itemsize for s in found}
    records: dict[str, Record] = {}
    for key in cast("list[Any]", keys):
        count = int.from_bytes(file.read(8), "little")
        nbytes = count * widths.get(str(key), 1)
        offset = file.tell()
        if offset + nbytes > size:
            raise ValueError("truncated: a storage reaches beyond the file")
        if str(key) not in widths:
            raise ValueError(f"nothing says how wide the numbers of '{str(key)[:40]}' are")
        records[str(key)] = Record(offset, nbytes)
        file.seek(nbytes, io.SEEK_CUR)
    return PickleFile(path, size, content, records)
