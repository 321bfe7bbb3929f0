"""Guards that reading returns the file's bytes, from any thread, and identifies content."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.reader import CheckpointReader, StateDictReader
from eutectic.errors import CheckpointError

from .helpers import item, same_bytes, save_sharded, write_raw


def reader_of(path: Path) -> CheckpointReader:
    return CheckpointReader(open_index(path))


def save(folder: Path, tensors: dict[str, Tensor], layout: str) -> Path:
    folder.mkdir(exist_ok=True)
    names = list(tensors)
    if layout == "single":
        save_file(tensors, folder / "model.safetensors")
    elif layout == "sharded":
        shards = {f"s{i}.safetensors": {n: tensors[n] for n in names[i::3]} for i in range(3)}
        save_sharded(folder, shards)
    else:
        legacy = layout == "legacy"
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    return folder


@pytest.mark.parametrize("layout", ["single", "sharded", "pickle", "legacy"])
def test_every_kind_of_tensor_comes_back(
    tmp_path: Path, tensors: dict[str, Tensor], layout: str
) -> None:
    if layout == "legacy":
        del tensors["eighth"]  # torch itself cannot store 8-bit floats in that format
    with reader_of(save(tmp_path / layout, tensors, layout)) as reader:
        for name, value in tensors.items():
            read = reader.read(name)
            assert read.ndim == 1
            assert same_bytes(read, value), name


def test_fingerprint_ignores_the_layout_and_sees_changes(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    layouts = ["single", "sharded", "pickle"]
    prints = {reader_of(save(tmp_path / n, tensors, n)).fingerprint() for n in layouts}
    prints.add(StateDictReader(tensors).fingerprint())
    assert len(prints) == 1
    for name in ("layer.weight", "mask", "count"):
        changed = {**tensors, name: ~tensors[name] if name == "mask" else tensors[name] + 1}
        assert StateDictReader(changed).fingerprint() not in prints
    reshaped = {**tensors, "layer.weight": tensors["layer.weight"].reshape(7, 5)}
    assert StateDictReader(reshaped).fingerprint() not in prints
    renamed = dict(tensors)
    renamed["other"] = renamed.pop("count")
    assert StateDictReader(renamed).fingerprint() not in prints


@pytest.mark.parametrize("position", [0, 50_000, 99_999])
def test_fingerprint_samples_start_middle_and_end(position: int) -> None:
    values = torch.zeros(100_000)
    before = StateDictReader({"a": values}).fingerprint()
    values[position] = 1
    assert StateDictReader({"a": values}).fingerprint() != before


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int16, torch.bool]),
    data=st.data(),
)
def test_ranges(
    tmp_path_factory: pytest.TempPathFactory,
    shape: list[int],
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    value = torch.randint(0, 2, shape).to(dtype)
    start = data.draw(st.integers(0, value.numel()))
    stop = data.draw(st.integers(start, value.numel()))
    folder = tmp_path_factory.mktemp("ranges")
    save_file({"pad": torch.ones(3).half(), "x": value}, folder / "model.safetensors")
    with reader_of(folder) as reader:
        assert same_bytes(reader.read("x", start, stop), value.reshape(-1)[start:stop])
        assert same_bytes(reader.read("x", start), value.reshape(-1)[start:])


def test_results_own_their_memory(tmp_path: Path) -> None:
    for layout in ("single", "pickle"):
        folder = save(tmp_path / layout, {"a": torch.ones(4)}, layout)
        with reader_of(folder) as reader:
            reader.read("a").zero_()
            assert reader.read("a").sum() == 4
        assert reader_of(folder).read("a").sum() == 4


def test_strided_pickled_tensors_are_read_in_logical_order(tmp_path: Path) -> None:
    value = torch.arange(12.0).view(3, 4)
    torch.save({"t": value.T, "column": value[:, 1]}, tmp_path / "m.pt")
    with reader_of(tmp_path) as reader:
        assert torch.equal(reader.read("t", 2, 7), value.T.reshape(-1)[2:7])
        assert torch.equal(reader.read("column"), value[:, 1])


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.randn(1000)
    save_file({"a": value}, tmp_path / "model.safetensors")
    whole = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return whole(descriptor, [buffers[0][:17]], offset)

    monkeypatch.setattr(os, "preadv", short)
    with reader_of(tmp_path) as reader:
        assert torch.equal(reader.read("a"), value)


def open_descriptors() -> int:
    """Return how many files this process has open; 0 where the system does not tell."""
    listing = Path("/proc/self/fd")
    return len(list(listing.iterdir())) if listing.exists() else 0


def test_threads_share_a_reader_with_few_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eutectic.checkpoint.reader._MAX_OPEN_FILES", 2)
    values = {f"t{i}": torch.full((1000,), float(i)) for i in range(12)}
    save_sharded(tmp_path, {f"s{i:02}.safetensors": {n: values[n]} for i, n in enumerate(values)})
    faults: list[str] = []
    before = open_descriptors()
    with reader_of(tmp_path) as reader:

        def work(shift: int) -> None:
            for k in range(60):
                name = f"t{(k * 5 + shift) % 12}"
                if not torch.equal(reader.read(name, 10, 500), values[name][10:500]):
                    faults.append(name)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if before:
            assert open_descriptors() <= before + 2
    assert faults == []
    if before:
        assert open_descriptors() == before


def test_unknown_tensor_and_range(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    with reader_of(tmp_path) as reader:
        with pytest.raises(CheckpointError, match="no tensor 'b'"):
            reader.read("b")
        for start, stop in [(-1, 2), (0, 5), (3, 2)]:
            with pytest.raises(ValueError, match="outside"):
                reader.read("a", start, stop)


def test_file_that_shrinks_or_vanishes_after_opening(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4000)}, path)
    with reader_of(tmp_path) as reader:
        reader.read("a", 0, 10)
        os.truncate(path, 5000)
        with pytest.raises(CheckpointError, match="ends early"):
            reader.read("a")
        reader.close()
        with pytest.raises(CheckpointError, match="replaced or changed"):
            reader.read("a", 0, 10)
        reader.close()
        path.unlink()
        with pytest.raises(CheckpointError, match="cannot be read"):
            reader.read("a", 0, 10)


def test_booleans_with_other_bytes_are_corrupt(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"m": item([3], 0, 3, "BOOL")}, b"\0\1\2")
    with reader_of(tmp_path) as reader:
        assert reader.read("m", 0, 2).tolist() == [False, True]
        with pytest.raises(CheckpointError, match="boolean"):
            reader.read("m")


def test_identity_lists_files_with_size_and_time(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"one.safetensors": {"a": torch.ones(2)}})
    (tmp_path / "config.json").write_text("{}")
    with reader_of(tmp_path) as reader:
        names = [name for name, _, _ in reader.identity()]
        assert names == ["one.safetensors", "model.safetensors.index.json", "config.json"]
        before = reader.identity()
        assert before[0][1] == (tmp_path / "one.safetensors").stat().st_size
        os.utime(tmp_path / "one.safetensors", ns=(5, 5))
        assert reader.identity() != before
