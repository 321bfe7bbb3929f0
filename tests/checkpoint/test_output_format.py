"""Guards that outputs lie like the base, or in shards of the size that was asked for."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from eutectic.checkpoint.index import CheckpointIndex, open_index
from eutectic.checkpoint.output_format import InShards, LaidOutLikeBase, OutputFormat, OutputTensor
from eutectic.checkpoint.writer import OutputFile

from .helpers import same_bytes, save_sharded


def rows(
    index: CheckpointIndex, drop: Container[str] = (), dtype: torch.dtype | None = None
) -> list[OutputTensor]:
    """Return the base's tensors as an output's, floating ones in `dtype`."""
    return [
        OutputTensor(
            e.name, dtype if dtype and e.dtype.is_floating_point else e.dtype, e.shape, e.file
        )
        for e in index.entries.values()
        if e.name not in drop
    ]


def written(
    format: OutputFormat, folder: Path, files: list[OutputFile], tensors: Mapping[str, Tensor]
) -> CheckpointIndex:
    """Write tensors in a format and open what was written."""
    with format.open(folder, files, resume=False) as writer:
        for name, value in tensors.items():
            writer.write(name, 0, value)
        writer.sync()
    format.finish(folder, files)
    return open_index(folder)


def test_a_single_file_keeps_its_metadata(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "odd.safetensors", metadata={"format": "np", "own": "1"})
    index = open_index(tmp_path)
    given = rows(index, dtype=torch.bfloat16)
    (file,) = LaidOutLikeBase(index).lay_out(given, {"eutectic": "recipe"})
    assert file.name == "odd.safetensors"
    assert file.metadata == {"format": "pt", "own": "1", "eutectic": "recipe"}
    assert file.entries == tuple((t.name, t.dtype, t.shape) for t in given)
    assert file.data_bytes == sum(t.nbytes for t in given)
    LaidOutLikeBase(index).finish(tmp_path / "out", [file])
    assert not (tmp_path / "out").exists()  # one file needs no index


def test_shards_of_the_base_and_their_index(tmp_path: Path) -> None:
    shards = {
        "x-1.safetensors": {"b": torch.ones(4), "a": torch.ones(2)},
        "x-2.safetensors": {"c": torch.ones(3)},
    }
    index = open_index(save_sharded(tmp_path, shards))
    like_base = LaidOutLikeBase(index)
    files = like_base.lay_out(rows(index), {})
    assert [(f.name, [n for n, _, _ in f.entries]) for f in files] == [
        ("x-1.safetensors", ["a", "b"]),
        ("x-2.safetensors", ["c"]),
    ]
    (tmp_path / "out").mkdir()
    like_base.finish(tmp_path / "out", files)
    table = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert table["metadata"] == {"total_size": 36}
    assert table["weight_map"] == {
        "a": "x-1.safetensors",
        "b": "x-1.safetensors",
        "c": "x-2.safetensors",
    }
    fewer = like_base.lay_out(rows(index, drop={"c"}), {})
    assert [f.name for f in fewer] == ["x-1.safetensors"]


def test_tensors_that_the_base_lacks_or_shapes_otherwise(tmp_path: Path) -> None:
    shards = {"x-1.safetensors": {"a": torch.ones(2)}, "x-2.safetensors": {"c": torch.ones(3)}}
    index = open_index(save_sharded(tmp_path, shards))
    like_base = LaidOutLikeBase(index)
    new = OutputTensor("new", torch.float16, (5,))
    renamed = OutputTensor("renamed", torch.float32, (7, 2), "x-1.safetensors")
    files = like_base.lay_out([new, renamed, *rows(index, drop={"a"})], {})
    assert [(f.name, f.entries) for f in files] == [
        ("x-1.safetensors", (("renamed", torch.float32, (7, 2)),)),
        ("x-2.safetensors", (("c", torch.float32, (3,)), ("new", torch.float16, (5,)))),
    ]
    alone = like_base.lay_out([new], {})
    assert [(f.name, len(f.entries)) for f in alone] == [("x-2.safetensors", 1)]


def test_pickles_become_safetensors(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    index = open_index(tmp_path)
    (file,) = LaidOutLikeBase(index).lay_out(rows(index), {})
    assert (file.name, file.metadata) == ("model.safetensors", {"format": "pt"})
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    weight_map: dict[str, str] = {}
    for i, name in enumerate("ab", start=1):
        torch.save({name: torch.ones(2)}, sharded / f"pytorch_model-0000{i}-of-00002.bin")
        weight_map[name] = f"pytorch_model-0000{i}-of-00002.bin"
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    index = open_index(sharded)
    like_base = LaidOutLikeBase(index)
    files = like_base.lay_out(rows(index), {})
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [f.name for f in files] == names
    out = written(like_base, tmp_path / "out", files, {n: torch.ones(2) for n in "ab"})
    assert out.weight_index == "model.safetensors.index.json"


def test_output_laid_out_like_shards_is_a_checkpoint(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    names = list(tensors)
    shards = {f"s{i}.safetensors": {n: tensors[n] for n in names[i::2]} for i in range(2)}
    index = open_index(save_sharded(tmp_path / "base", shards))
    like_base = LaidOutLikeBase(index)
    out = written(like_base, tmp_path / "out", like_base.lay_out(rows(index), {}), tensors)
    assert list(out.entries) == list(index.entries)
    for file in shards:
        found, original = (load_file(tmp_path / d / file) for d in ("out", "base"))
        assert all(same_bytes(found[k], original[k]) for k in original)


KINDS = (torch.float32, torch.bfloat16, torch.int64, torch.bool)


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=8),
    bound=st.integers(1, 300),
)
def test_any_tensors_in_shards_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], bound: int
) -> None:
    made = {f"t{i}": torch.randint(0, 2, s).to(KINDS[i % 4]) for i, s in enumerate(shapes)}
    given = [OutputTensor(name, v.dtype, tuple(v.shape)) for name, v in made.items()]
    in_shards = InShards(bound)
    files = in_shards.lay_out(given, {"eutectic": "recipe"})
    # The tensors, in their order; no shard is larger than asked for unless one tensor alone is;
    # none could have taken the tensor that follows it.
    assert [n for f in files for n, _, _ in f.entries] == list(made)
    sizes = {t.name: t.nbytes for t in given}
    for file, following in zip(files, [*files[1:], None], strict=True):
        assert file.data_bytes <= bound or len(file.entries) == 1
        if following is not None:
            assert file.data_bytes + sizes[following.entries[0][0]] > bound
    count = len(files)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert [f.name for f in files] == (["model.safetensors"] if count == 1 else names)
    out = written(in_shards, tmp_path_factory.mktemp("shards") / "out", files, made)
    assert out.weight_index == (None if count == 1 else "model.safetensors.index.json")
    assert out.entries.keys() == made.keys()
    assert all(out.metadata[f.name] == {"format": "pt", "eutectic": "recipe"} for f in files)
    loaded = {k: v for f in files for k, v in load_file(out.folder / f.name).items()}
    assert all(same_bytes(loaded[k], v) for k, v in made.items())


def test_a_tensor_larger_than_a_shard_stands_alone() -> None:
    given = [
        OutputTensor(name, torch.float32, (n,))
        for name, n in zip("abcd", (1, 9, 1, 1), strict=True)
    ]
    files = InShards(12).lay_out(given, {})
    assert ["".join(n for n, _, _ in f.entries) for f in files] == ["a", "b", "cd"]
