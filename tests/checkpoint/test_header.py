"""Guards the parser of safetensors headers: it accepts what safetensors writes, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from eutectic.checkpoint import header
from eutectic.checkpoint.header import MAX_HEADER_BYTES, build_header, read_header
from eutectic.errors import CheckpointError

from .helpers import item, write_raw

FOUR = b"\0" * 4


def test_agrees_with_what_safetensors_writes(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt", "note": "ü"})
    header = read_header(tmp_path / "m.safetensors")
    assert header.metadata == {"format": "pt", "note": "ü"}
    found = {t.name: (t.dtype, t.shape) for t in header.tensors}
    assert found == {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}
    offsets = [t.offset for t in header.tensors]
    assert offsets == sorted(offsets)


HOSTILE: dict[str, tuple[Any, bytes, str]] = {
    "no JSON": (b"{nonsense}", b"", "not valid JSON"),
    "not an object": (b"[1, 2]", b"", "does not begin with"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "deep nesting": (b'{"a":' + b"[" * 100_000, b"", "not valid JSON"),
    "key twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        FOUR,
        "'a' occurs twice",
    ),
    "metadata not strings": ({"__metadata__": {"x": 1}}, b"", "must map names to strings"),
    "no dict": ({"a": 5}, b"", "needs 'dtype'"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, FOUR, "needs 'dtype'"),
    "unknown type": ({"a": item([1], 0, 4, "F33")}, FOUR, "data type 'F33'.*not supported"),
    "type is a list": ({"a": item([1], 0, 4, ["F32"])}, FOUR, "not supported"),  # type: ignore[arg-type]
    "negative size": ({"a": item([-1, -1], 0, 4)}, FOUR, "not a list of sizes"),
    "fractional size": ({"a": item([1.0], 0, 4)}, FOUR, "not a list of sizes"),  # type: ignore[list-item]
    "boolean size": ({"a": item([True], 0, 4)}, FOUR, "not a list of sizes"),
    "huge size times zero": ({"a": item([0, 2**70], 0, 0)}, b"", "not a list of sizes"),
    "negative offset": ({"a": item([1], -4, 0)}, FOUR, "data_offsets"),
    "reversed offsets": ({"a": item([1], 4, 0)}, FOUR, "data_offsets"),
    "three offsets": (
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}},
        FOUR,
        "data_offsets",
    ),
    "shape too large": ({"a": item([2], 0, 4)}, FOUR, "takes 8 bytes, it claims 4"),
    "overflowing shape": ({"a": item([2**40, 2**40], 0, 4)}, FOUR, "it claims 4"),
    "overlap": ({"a": item([2], 0, 8), "b": item([2], 4, 12)}, FOUR * 3, "'b' overlaps 'a'"),
    "same bytes twice": ({"a": item([1], 0, 4), "b": item([1], 0, 4)}, FOUR, "overlaps"),
    "gap": ({"a": item([1], 0, 4), "b": item([1], 8, 12)}, FOUR * 3, "'b' leaves a gap"),
    "gap at the start": ({"a": item([1], 4, 8)}, FOUR * 2, "gap after the header"),
    "data missing": ({"a": item([2], 0, 8)}, FOUR, "truncated"),
    "data in excess": ({"a": item([1], 0, 4)}, FOUR * 2, "inconsistent header"),
    "half a surrogate": (b'{"\\ud800": {}}', b"", "not valid Unicode"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_with_file_and_reason(tmp_path: Path, case: str) -> None:
    header, data, message = HOSTILE[case]
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_huge_header_length_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=f"the limit is {MAX_HEADER_BYTES:,}"):
        read_header(path)


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes((1000).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(path)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(cut=st.integers(0, 400), data=st.data())
def test_every_truncation_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, cut: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    save_file({"a": torch.randn(10), "b": torch.randn(3, 4)}, folder / "m.safetensors")
    whole = (folder / "m.safetensors").read_bytes()
    (folder / "m.safetensors").write_bytes(whole[: cut % len(whole)])
    with pytest.raises(CheckpointError):
        read_header(folder / "m.safetensors")


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
dtypes = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]
)


@settings(deadline=None, max_examples=60)
@given(table=st.dictionaries(st.text(min_size=1), st.tuples(dtypes, shapes), max_size=6))
def test_built_headers_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    table: dict[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    table.pop("__metadata__", None)
    header, placed = build_header([(k, d, s) for k, (d, s) in table.items()], {"format": "pt"})
    assert len(header) % 8 == 0
    path = tmp_path_factory.mktemp("built") / "m.safetensors"
    path.write_bytes(header + b"\0" * sum(t.nbytes for t in placed))
    read = read_header(path)
    assert set(read.tensors) == set(placed)
    assert read.metadata == {"format": "pt"}
    assert all(t.offset % t.dtype.itemsize == 0 for t in placed if t.nbytes)


def test_header_keeps_order_within_an_item_size() -> None:
    header, placed = build_header(
        [("z", torch.float32, (1,)), ("m", torch.int64, (1,)), ("a", torch.float32, (1,))], {}
    )
    assert [t.name for t in placed] == ["m", "z", "a"]
    assert list(json.loads(header[8:])) == ["m", "z", "a"]


def test_name_twice_cannot_be_laid_out() -> None:
    with pytest.raises(ValueError, match="twice"):
        build_header([("a", torch.float32, (1,)), ("a", torch.float32, (1,))], {})


def test_the_same_header_of_two_files_is_one_table(tmp_path: Path) -> None:
    for name, shape in (("a", (2, 3)), ("b", (2, 3)), ("c", (3, 2))):
        save_file({"x": torch.ones(shape)}, tmp_path / name)
    a, b, c = (read_header(tmp_path / name) for name in "abc")
    assert a.tensors is b.tensors and [t.shape for t in c.tensors] == [(3, 2)]
    assert read_header(tmp_path / "a", "elsewhere").tensors[0].file == "elsewhere"
    with (tmp_path / "b").open("ab") as file:  # the same header before more data
        file.write(b"more")
    with pytest.raises(CheckpointError, match="inconsistent"):
        read_header(tmp_path / "b")


def test_tables_that_were_read_are_kept_within_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header, "_KNOWN", header._Known())
    monkeypatch.setattr(header, "_MOST_KEPT", 5)
    for name, count in (("a", 3), ("b", 3), ("c", 6)):
        save_file({f"{name}{i}": torch.ones(1) for i in range(count)}, tmp_path / name)
    a, b, c = (read_header(tmp_path / name) for name in "abc")
    assert read_header(tmp_path / "b") is b
    assert read_header(tmp_path / "a") is not a and read_header(tmp_path / "c") is not c
