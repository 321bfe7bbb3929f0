"""Torch's own formats: the same values as `torch.load` gives, nothing run, sizes as in the file."""

from __future__ import annotations

import io
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.pickles import read_pickle
from eutectic.checkpoint.reader import CheckpointReader
from eutectic.errors import CheckpointError, EutecticError

G = torch.Generator().manual_seed(0)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
NEWER = (torch.int16, torch.int8, torch.uint8, torch.uint16, torch.float8_e4m3fn, torch.complex64)


def table() -> dict[str, Tensor]:
    wide = torch.randn(6, 8, generator=G)
    tensors: dict[str, Tensor] = {
        "plain": wide,
        "row": wide[2],
        "rows": wide[1:4],
        "columns": wide[:, 2:5],
        "transposed": wide.T,
        "steps": wide.reshape(-1)[::3],
        "expanded": torch.randn(1, 4, generator=G).expand(5, 4),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3, generator=G)),
        "flags": torch.tensor([True, False, True]),
    }
    for dtype in (*DTYPES, *NEWER):
        tensors[str(dtype)] = (torch.randn(4, 5, generator=G) * 3).to(dtype)
    return tensors


def compressed(source: Path, target: Path) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


SAVED: dict[str, Callable[[Any, Path], None]] = {
    "zip": lambda value, path: torch.save(value, path),
    "protocol 4": lambda value, path: torch.save(value, path, pickle_protocol=4),
    "protocol 5": lambda value, path: torch.save(value, path, pickle_protocol=5),
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("how", [*SAVED, "compressed"])
@pytest.mark.parametrize("inside", [False, True])
def test_values_are_those_of_torch(tmp_path: Path, how: str, inside: bool) -> None:
    values = table()
    if how == "legacy":  # whose storages are of one type each, from before there were these
        values = {k: v for k, v in values.items() if k not in map(str, NEWER[3:5])}
    stored: Any = OrderedDict(values)
    stored._metadata = {"": {"version": 1}}
    content = {"model": stored, "epoch": 3, "best": 0.5, "names": ["a", {"b": 1}]}
    path = tmp_path / "pytorch_model.bin"
    SAVED.get(how, SAVED["zip"])(content if inside else stored, path)
    if how == "compressed":
        compressed(path, tmp_path / "packed.bin")
        path = tmp_path / "packed.bin"
    expected: Any = content if inside else stored
    if not how.startswith("protocol"):  # which torch itself does not read without running code
        expected = torch.load(path, weights_only=True)
    expected = expected["model"] if inside else expected
    with CheckpointReader(open_index(path)) as reader:
        assert list(reader.entries) == list(expected)
        for name, value in expected.items():
            entry = reader.entries[name]
            assert (entry.dtype, entry.shape) == (value.dtype, tuple(value.shape))
            flat = value.detach().contiguous().reshape(-1)
            for start, stop in ((0, flat.numel()), (flat.numel() // 3, flat.numel() // 2)):
                own = reader.read(name, start, stop)
                raw = flat[start:stop].contiguous().view(torch.uint8)
                assert torch.equal(own.view(torch.uint8), raw), name
        # What lies in a row is read by positions, so that nothing is mapped.
        assert (reader.entries["plain"].offset > 0) is (how != "compressed")
        assert reader.entries["transposed"].offset == -1


def test_compressed_numbers_are_numbers(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(4, dtype=torch.float64)}, tmp_path / "plain.bin")
    compressed(tmp_path / "plain.bin", tmp_path / "model.bin")
    with CheckpointReader(open_index(tmp_path / "model.bin")) as reader:
        assert reader.read("w").tolist() == [0, 1, 2, 3]


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_pickle(path)
    assert str(path) in str(caught.value)


def test_expanded_tensors_beyond_the_file_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**12)}, tmp_path / "a.bin")
    refused(tmp_path / "a.bin", r"4,000,000,000,000 bytes when they are written out, the limit")


def test_packed_bombs_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1 << 25)}, tmp_path / "a.bin")
    compressed(tmp_path / "a.bin", tmp_path / "b.bin")
    refused(tmp_path / "b.bin", "134,217,728 bytes when they are written out, the limit")


def edited(path: Path, target: Path, **changes: bytes) -> None:
    """Write an archive again with records of other bytes; `data_pkl` means `data.pkl`."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            last = name.rpartition("/")[2].replace(".", "_")
            new.writestr(name, changes.get(last, old.read(name)))


@pytest.mark.parametrize("claimed", [8, 1000])
def test_a_storage_has_the_size_of_its_record(tmp_path: Path, claimed: int) -> None:
    torch.save({"w": torch.zeros(claimed)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as archive:
        record = next(name for name in archive.namelist() if name.endswith("data/0"))
    edited(tmp_path / "a.bin", tmp_path / "b.bin", **{record.rpartition("/")[2]: b"\0" * 4})
    refused(tmp_path / "b.bin", f"claims {claimed * 4:,} bytes, its record has 4")


def test_kinds_that_are_not_dense_are_named(tmp_path: Path) -> None:
    dense = torch.randn(4, 4, generator=G)
    kinds: dict[str, Tensor] = {
        "sparse": dense.to_sparse(),
        "meta": dense.to("meta"),
        "complex128": dense.to(torch.complex128),
        "conjugated": dense.to(torch.complex64).conj(),
    }
    for kind, value in kinds.items():
        torch.save({"w": value}, tmp_path / f"{kind}.bin")
        refused(tmp_path / f"{kind}.bin", f"'w' is .*{kind}.*only dense")


class Runs:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('it ran')",))


class Grows:
    def __reduce__(self) -> Any:
        return (bytearray, (1 << 45,))


def program(content: Any) -> bytes:
    return pickle.dumps(content, protocol=2)


def nested(depth: int) -> bytes:
    """Return a pickle of a dict whose key is a tuple of tuples, 2^depth leaves in all."""
    lines = [b"\x80\x02}", b"K\x01", b"q\x00"]
    for i in range(depth):
        lines += [b"h" + bytes([i]), b"\x86", b"q" + bytes([i + 1])]
    return b"".join([*lines, b"K\x01", b"s."])


HOSTILE: dict[str, bytes] = {
    "code": program({"w": Runs()}),
    "a builtin that allocates": program({"w": Grows()}),
    "keys without end": nested(200),
    "no end": b"\x80\x02}",
    "taken from nothing": b"\x80\x02a.",
    "memory that is not there": b"\x80\x02h\x05.",
    "a place in memory far away": b"\x80\x02}r\xff\xff\xff\xff.",
    "a text longer than the file": b"\x80\x02X\xff\xff\xff\x7fab.",
    "an instance": b"\x80\x02(ios\nsystem\n.",
    "a number of 5,000 digits": b"\x80\x02I" + b"1" * 5000 + b"\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "itself": b"\x80\x02]q\x00h\x00a.",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_programs_are_refused_and_run_nothing(tmp_path: Path, case: str) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "a.bin")
    edited(tmp_path / "a.bin", tmp_path / "b.bin", data_pkl=HOSTILE[case])
    started = time.process_time()
    refused(tmp_path / "b.bin", "damaged|expected a table|no tensors")
    (tmp_path / "bare.bin").write_bytes(HOSTILE[case])
    refused(tmp_path / "bare.bin", "damaged|text, not weights|no tensors")
    assert time.process_time() - started < 5


SMALL = {"w": torch.arange(6.0).reshape(2, 3), "v": torch.arange(6.0)[1:3]}


def bytes_of(legacy: bool) -> bytes:
    file = io.BytesIO()
    torch.save(SMALL, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


@settings(max_examples=500)
@given(st.data())
@pytest.mark.parametrize("legacy", [False, True])
def test_damage_anywhere_is_accepted_or_refused(
    tmp_path_factory: pytest.TempPathFactory, legacy: bool, data: st.DataObject
) -> None:
    raw = bytearray(bytes_of(legacy))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.mktemp("damaged") / "model.bin"
    path.write_bytes(bytes(raw))
    try:
        with CheckpointReader(open_index(path)) as reader:
            for name, entry in reader.entries.items():
                assert reader.read(name).numel() == entry.numel
    except EutecticError as error:
        assert str(path) in str(error)


@settings(max_examples=500)
@given(st.binary(max_size=60))
def test_any_program_is_accepted_or_refused(
    tmp_path_factory: pytest.TempPathFactory, body: bytes
) -> None:
    path = tmp_path_factory.mktemp("program") / "model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        archive.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))
    try:
        read_pickle(path)
    except EutecticError as error:
        assert str(path) in str(error)
