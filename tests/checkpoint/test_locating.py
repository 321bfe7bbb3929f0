"""Guards what a folder stands for that holds its model one level down, and in odd files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

import eutectic
from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.locating import locate
from eutectic.errors import CheckpointError, RecipeError
from helpers.cli import invoke
from helpers.folders import load, make_base, make_expert
from helpers.folders import save as save_folder

LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["proj"]}
SETTINGS = {**LORA, "base_model_name_or_path": "base"}


def put_adapter(folder: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    at = "base_model.model.layers.0.proj"
    factors = {
        f"{at}.lora_A.weight": torch.randn(2, 16, generator=generator),
        f"{at}.lora_B.weight": torch.randn(32, 2, generator=generator),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, an expert and an adapter, each as its folder and below one that holds no weights."""
    save_folder(tmp_path / "base", make_base())
    save_folder(tmp_path / "a", make_expert(make_base(), 1))
    put_adapter(tmp_path / "lora")
    for name, inner in (("base", "final"), ("a", "checkpoint-500"), ("lora", "adapter")):
        shutil.copytree(tmp_path / name, tmp_path / "deep" / name / inner)
        (tmp_path / "deep" / name / "runs").mkdir()
        (tmp_path / "deep" / name / "README.md").write_text("x")
    return tmp_path


def merged(folder: Path, base: Path, **experts: object) -> dict[str, torch.Tensor]:
    output = folder / f"out-{len(list(folder.iterdir()))}"
    eutectic.merge(base=base, experts=experts, method="average", output=output)
    return load(output)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[n].equal(second[n]) for n in first)


def test_one_level_down_is_merged_as_if_it_were_named(place: Path) -> None:
    plain = merged(place, place / "base", a=place / "a", lora=place / "lora")
    deep = place / "deep"
    assert equal(merged(place, deep / "base", a=deep / "a", lora=str(deep / "lora")), plain)
    # From a recipe, with paths that are relative to it.
    recipe = "base: deep/base\nexperts: {a: ./deep/a, lora: deep/lora/}\nmethod: average\n"
    (place / "recipe.yaml").write_text(recipe)
    answer = invoke("merge", place / "recipe.yaml", "-o", place / "by-recipe")
    assert answer.code == 0, answer
    assert equal(load(place / "by-recipe"), plain)
    for who, below in (
        ("base", "deep/base/final"),
        ("expert 'a'", "deep/a/checkpoint-500"),
        ("expert 'lora'", "deep/lora/adapter"),
    ):
        told = (
            f"{who}: the folder itself holds no weights; taken is what lies below: {place}/{below}"
        )
        assert "".join(told.split()) in "".join((answer.out + answer.err).split())


def test_several_are_listed_with_what_to_type(place: Path) -> None:
    run = place / "run"
    for step in (1000, 900):
        put_adapter(run / f"checkpoint-{step}", step)
    save_folder(run / "model", make_base())
    with pytest.raises(CheckpointError) as caught:
        locate(run)
    listed = str(caught.value).splitlines()[2:]
    assert [line.strip() for line in listed] == [
        f"{run}/checkpoint-900  (adapter)",
        f"{run}/checkpoint-1000  (adapter)",
        f"{run}/model  (checkpoint)",
    ]
    # A base is a full checkpoint, of which there is one.
    assert locate(run, full=True).path == run / "model"
    answer = invoke(
        *("merge", "--base", place / "base", "-m", "average", "-o", place / "out"),
        *(f"a={run}", f"b={place / 'a'}"),
    )
    assert answer.code == 2 and f"{run}/checkpoint-900" in answer.err, answer
    assert not (place / "out").exists()


def test_named_adapters_beside_the_default_one(place: Path) -> None:
    folder = put_adapter(place / "many")
    put_adapter(folder / "other", 5)
    put_adapter(folder / "checkpoint-10", 6)  # an earlier state of the same
    found = locate(folder)
    assert (found.path, found.others) == (folder, (f"{folder}/other",))
    assert f"to merge another, name it: {folder}/other" in str(found.notes("expert 'a'")[0])
    plain = merged(place, place / "base", a=place / "lora")
    assert equal(merged(place, place / "base", a=folder), plain)
    assert not equal(merged(place, place / "base", a=folder / "other"), plain)


def test_named_adapters_alone(place: Path) -> None:
    put_adapter(place / "two/default")
    put_adapter(place / "two/other", 1)
    with pytest.raises(CheckpointError, match="2 folders below it do"):
        locate(place / "two")


def test_weights_in_the_folder_win(place: Path) -> None:
    put_adapter(place / "a/adapter")
    save_folder(place / "a/checkpoint-1", make_base())
    assert locate(place / "a").path == place / "a"
    assert locate(place / "a").notes("x") == []


def test_an_adapters_weights_stand_for_its_folder(place: Path) -> None:
    assert locate(place / "lora/adapter_model.safetensors").path == place / "lora"


def test_links_that_lead_out_are_not_followed(place: Path) -> None:
    folder = place / "linked"
    folder.mkdir()
    (folder / "final").symlink_to(place / "a", target_is_directory=True)
    assert locate(folder).path == folder
    # Named, a link may lead anywhere.
    assert locate(folder / "final").path == folder / "final"


@pytest.mark.parametrize("aside", ["original", "onnx", "runs", "global_step5", ".cache"])
def test_folders_that_are_no_models(place: Path, aside: str) -> None:
    folder = place / "x"
    save_folder(folder / aside, make_base())
    assert locate(folder).path == folder
    save_folder(folder / "final", make_base())
    assert locate(folder).path == folder / "final"


def test_a_mistyped_path_is_no_model_of_the_hub(place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(RecipeError, match=r"experts\.a: no such file: deep/a/checkpoint-50"):
        merged(place, place / "base", a="deep/a/checkpoint-50")


def put_shards(folder: Path, tensors: dict[str, torch.Tensor], suffix: str = "safetensors") -> Path:
    folder.mkdir()
    names = sorted(tensors)
    for i, own in enumerate((names[:3], names[3:5], names[5:]), start=1):
        held = {name: tensors[name] for name in own}
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        file = folder / f"{stem}-{i:05d}-of-00003.{suffix}"
        save_file(held, file) if suffix == "safetensors" else torch.save(held, file)
    (folder / "config.json").write_text('{"model_type": "toy"}')
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_without_an_index(place: Path, suffix: str) -> None:
    plain = merged(place, place / "base", a=place / "a")
    base = put_shards(place / "base-shards", make_base(), suffix)
    expert = put_shards(place / "a-shards", make_expert(make_base(), 1), suffix)
    (expert / "consolidated.safetensors").write_bytes(b"the same under other names")
    output = place / "sharded"
    report = eutectic.merge(base=base, experts={"a": expert}, method="average", output=output)
    assert equal(load(output), plain)
    assert any(
        note
        == "no index lists the shards of the base, expert 'a'; all 3 are there by their names, "
        "and were read"
        for note in map(str, report.note_records)
    ), report.note_records
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == plain.keys()
    assert {*index["weight_map"].values()} == {p.name for p in output.glob("*.safetensors")}


def test_shards_that_hold_a_tensor_twice(tmp_path: Path) -> None:
    for i in (1, 2):
        save_file(
            {"a": torch.ones(2), f"b{i}": torch.ones(1)}, tmp_path / f"x-{i}-of-2.safetensors"
        )
    with pytest.raises(CheckpointError, match="both hold a, and no index says"):
        open_index(tmp_path)


def test_two_sets_of_shards_are_two_checkpoints(tmp_path: Path) -> None:
    for name in ("x-1-of-2", "x-2-of-2", "y-1-of-2", "y-2-of-2"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="several files could be the checkpoint"):
        open_index(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.pt"])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_content_decides_the_format(place: Path, name: str, legacy: bool) -> None:
    tensors = make_expert(make_base(), 1)
    folder = place / "odd"
    folder.mkdir()
    if name.endswith(".safetensors"):
        torch.save(tensors, folder / name, _use_new_zipfile_serialization=not legacy)
    else:
        (folder / name).write_bytes(save(tensors))
    (folder / "config.json").write_text("{}")
    assert equal(
        merged(place, place / "base", a=folder), merged(place, place / "base", a=place / "a")
    )
    (note,) = open_index(folder).notes
    assert note.kind == "other_ending" and note.numbers["file"] == name
    # As base: the output is what its name says.
    assert equal(merged(place, folder, a=place / "a"), make_expert(make_base(), 1))


def test_a_header_whose_length_begins_like_a_pickle(tmp_path: Path) -> None:
    for padding in range(2000):
        raw = save({"a": torch.ones(1)}, {"x": "y" * padding})
        if raw[:2] == b"\x80\x02":
            break
    assert raw[:2] == b"\x80\x02"
    (tmp_path / "model.safetensors").write_bytes(raw)
    assert list(open_index(tmp_path).entries) == ["a"]
    assert open_index(tmp_path).notes == ()
