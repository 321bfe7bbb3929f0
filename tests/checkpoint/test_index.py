"""Guards which files of a folder count as the checkpoint, and what may not be believed of them."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eutectic.checkpoint.index import open_index
from eutectic.errors import CheckpointError

from .helpers import save_sharded, write_index

A = {"a": torch.ones(2)}
B = {"b": torch.zeros(3)}


def test_single_file(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    index = open_index(tmp_path)
    assert index.files == ("model.safetensors",)
    assert index.weight_index is None
    assert index.config == {"model_type": "bert"}
    assert index.metadata == {"model.safetensors": {"format": "pt"}}
    assert {k: (e.dtype, e.shape) for k, e in index.entries.items()} == {
        k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()
    }
    assert index.entries["empty"].numel == 0
    assert index.entries["count"].numel == 1


def test_sharded(tmp_path: Path) -> None:
    save_sharded(
        tmp_path, {"model-00002-of-00002.safetensors": B, "model-00001-of-00002.safetensors": A}
    )
    index = open_index(tmp_path)
    assert index.files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert list(index.entries) == ["a", "b"]
    assert index.weight_index == "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin", "weights.pt"])
def test_lone_file_of_any_name_and_file_paths(tmp_path: Path, name: str) -> None:
    if name.endswith(".safetensors"):
        save_file(A, tmp_path / name)
    else:
        torch.save(A, tmp_path / name)
    for leftover in ("optimizer.pt", "training_args.bin", "adapter_model.bin", "rng_state_0.pth"):
        (tmp_path / leftover).write_bytes(b"not weights")
    assert open_index(tmp_path).files == (name,)
    assert list(open_index(tmp_path / name).entries) == ["a"]


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    torch.save(B, tmp_path / "pytorch_model.bin")
    save_file(A, tmp_path / "model.safetensors")
    assert list(open_index(tmp_path).entries) == ["a"]


def test_usual_index_wins_over_other_files(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"model-00001-of-00001.safetensors": A})
    save_file(B, tmp_path / "consolidated.safetensors")
    assert list(open_index(tmp_path).entries) == ["a"]


def test_stale_single_file_beside_shards(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"model-00001-of-00001.safetensors": A})
    save_file(B, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="stale"):
        open_index(tmp_path)
    assert list(open_index(tmp_path / "model.safetensors").entries) == ["b"]
    assert list(open_index(tmp_path / "model.safetensors.index.json").entries) == ["a"]


def test_several_candidates(tmp_path: Path) -> None:
    save_file(A, tmp_path / "one.safetensors")
    save_file(B, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"one\.safetensors, two\.safetensors"):
        open_index(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no weights found"),
        ({"adapter_config.json": "{}"}, "PEFT adapter"),
        ({"model.txt": ""}, "no weights found"),
    ],
)
def test_folders_without_weights(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_index(tmp_path)


def test_missing_path_and_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_index(tmp_path / "nowhere")
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(CheckpointError, match="not a weight file"):
        open_index(tmp_path / "notes.md")


@pytest.mark.parametrize("text", ["{", "[1]", '"x"'])
def test_broken_config(tmp_path: Path, text: str) -> None:
    save_file(A, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_index(tmp_path)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "C:x"]
)
def test_index_may_only_name_plain_files(tmp_path: Path, file: str) -> None:
    save_file(A, tmp_path / "secret.safetensors")
    folder = save_sharded(tmp_path / "model", {"s.safetensors": A}, stolen=file)
    with pytest.raises(CheckpointError, match="not a plain name"):
        open_index(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}])
def test_index_without_a_proper_map(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r"weight_map|not a string"):
        open_index(tmp_path)


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    save_file(A, tmp_path / "outside.safetensors")
    folder = save_sharded(tmp_path / "model", {"one.safetensors": B}, a="two.safetensors")
    (folder / "two.safetensors").symlink_to("../outside.safetensors")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        open_index(folder)
    single = tmp_path / "single"
    single.mkdir()
    (single / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        open_index(single)
    # The user himself named the link.
    assert list(open_index(single / "model.safetensors").entries) == ["a"]


def test_links_inside_the_folder_and_to_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(A, folder / "stored")
    (folder / "model.safetensors").symlink_to("stored")
    (tmp_path / "alias").symlink_to(folder, target_is_directory=True)
    assert list(open_index(tmp_path / "alias").entries) == ["a"]


@pytest.mark.parametrize("shared", [False, True], ids=["blobs", "shared blobs"])
def test_links_of_the_hub_cache(tmp_path: Path, shared: bool) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc123"
    blobs = repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    blob = blobs / "0f0f"
    if shared:
        (tmp_path / "blobs" / "0f").mkdir(parents=True)
        blob = tmp_path / "blobs" / "0f" / "0f0f"
        (blobs / "0f0f").symlink_to(os.path.relpath(blob, blobs))
    save_file(A, blob)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0f0f")
    assert list(open_index(snapshot).entries) == ["a"]
    save_file(B, tmp_path / "other")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../other")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        open_index(snapshot)


def test_dangling_and_cyclic_links(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="leads nowhere"):
        open_index(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError, match="leads nowhere"):
        open_index(tmp_path)


def test_directory_and_pipe_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_index(tmp_path)
    (tmp_path / "model.safetensors").rmdir()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_index(tmp_path)


def test_index_names_a_missing_file(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"one.safetensors": A}, b="two.safetensors")
    with pytest.raises(CheckpointError, match=r"1 of 2 files that are missing: two\.safetensors"):
        open_index(tmp_path)


def test_index_lists_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"one.safetensors": A}, b="one.safetensors")
    with pytest.raises(CheckpointError, match="lists 1 tensors that the files do not hold: b"):
        open_index(tmp_path)


def test_shard_holds_an_unlisted_tensor(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"one.safetensors": {**A, **B}})
    write_index(tmp_path, {"a": "one.safetensors"})
    with pytest.raises(CheckpointError, match="'b', but .* does not list it"):
        open_index(tmp_path)


def test_tensor_in_another_shard_than_listed(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"one.safetensors": A, "two.safetensors": B}, a="two.safetensors")
    write_index(tmp_path, {"a": "two.safetensors", "b": "one.safetensors"})
    with pytest.raises(CheckpointError, match="says it is in"):
        open_index(tmp_path)


# --- torch pickles ---------------------------------------------------------------------------


class Touch:
    """Touches a file when unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    trap = tmp_path / "executed"
    content = {"a": torch.ones(2), "b": Touch(trap)}
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="holds code") as caught:
        open_index(tmp_path)
    assert str(path) in str(caught.value)
    assert not trap.exists()


def test_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(trap)))
    with pytest.raises(CheckpointError):
        open_index(tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"garbage" * 100, b"\x80\x02."])
def test_damaged_pickles(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(CheckpointError):
        open_index(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_pickles(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.randn(1000)}, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError):
        open_index(tmp_path)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_nested_state_dict_is_unwrapped(tmp_path: Path, wrapper: str) -> None:
    torch.save({wrapper: A, "epoch": 3, "args": {"lr": 0.1}}, tmp_path / "last.pt")
    index = open_index(tmp_path)
    assert list(index.entries) == ["a"]
    assert index.skipped == ("epoch (int)", "args (dict)")


def test_values_that_are_no_tensors_are_reported(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "version": 2, "_extra_state": None}, tmp_path / "m.pt")
    index = open_index(tmp_path)
    assert list(index.entries) == ["a"]
    assert index.skipped == ("version (int)", "_extra_state (NoneType)")


@pytest.mark.parametrize("content", [{"epoch": 3}, {}, [torch.ones(2)], torch.ones(2)])
def test_pickles_without_a_table_of_tensors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"no tensors|table of named tensors"):
        open_index(tmp_path)


def test_parameters_tied_and_strided_tensors(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    content = {
        "a": nn.Parameter(shared),
        "tied": shared,
        "transposed": shared.T,
        "part": shared[:, 1],
    }
    torch.save(content, tmp_path / "m.pt")
    entries = open_index(tmp_path).entries
    assert {k: e.shape for k, e in entries.items()} == {
        "a": (2, 3),
        "tied": (2, 3),
        "transposed": (3, 2),
        "part": (2,),
    }


def test_sparse_and_meta_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"only dense|damaged"):
        open_index(tmp_path)
    torch.save({"a": torch.empty(3, device="meta")}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"only dense|damaged"):
        open_index(tmp_path)


def test_sharded_pickles(tmp_path: Path) -> None:
    torch.save(A, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save(B, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    index = open_index(tmp_path)
    assert list(index.entries) == ["a", "b"]
    assert index.weight_index == "pytorch_model.bin.index.json"
