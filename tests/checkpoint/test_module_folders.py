"""Guards checkpoints in several folders: one table, one layout, nothing read elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eutectic
from eutectic.checkpoint.folder import side_files, survey
from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.reader import CheckpointReader
from eutectic.errors import CheckpointError, ResumeError
from helpers.folders import digests

Parts = dict[str, dict[str, Tensor]]  # folder of a module -> its tensors


def make_parts(seed: int, main: str = "") -> Parts:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    body = {"encoder.layer.0.dense.weight": randn(8, 8), "encoder.layer.0.dense.bias": randn(8)}
    return {main: body, "2_Dense": {"linear.weight": randn(4, 8), "linear.bias": randn(4)}}


def save_modules(
    root: Path, parts: Mapping[str, Mapping[str, Tensor]], *, pickled: str = ""
) -> Path:
    """Save modules as sentence-transformers does; `pickled` names the folder with a pickle."""
    main = next(iter(parts))
    listed = [main, "1_Pooling", *(folder for folder in parts if folder != main)]
    for folder in listed:
        (root / folder).mkdir(parents=True, exist_ok=True)
        stated = {"model_type": "bert"} if folder == main else {"in_features": 8}
        (root / folder / "config.json").write_text(json.dumps(stated))
        if folder == pickled and folder:
            torch.save(dict(parts[folder]), root / folder / "pytorch_model.bin")
        elif folder in parts:
            save_file(dict(parts[folder]), root / folder / "model.safetensors")
    kinds = [folder.rpartition("_")[2] or "Transformer" for folder in listed]
    modules = [
        {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for i, (folder, kind) in enumerate(zip(listed, kinds, strict=True))
    ]
    (root / "modules.json").write_text(json.dumps(modules))
    return root


def read(root: Path) -> Parts:
    """Return folder -> tensors of every module.safetensors below a folder."""
    files = root.rglob("model.safetensors")
    return {f.parent.relative_to(root).as_posix().replace(".", "", 1): load_file(f) for f in files}


def mean(*models: Parts) -> Parts:
    return {
        place: {key: torch.stack([m[place][key] for m in models]).mean(0) for key in tensors}
        for place, tensors in models[0].items()
    }


def same(found: Parts, wanted: Parts) -> bool:
    return {p: set(t) for p, t in found.items()} == {p: set(t) for p, t in wanted.items()} and all(
        torch.allclose(found[place][key], wanted[place][key], atol=1e-6)
        for place, tensors in wanted.items()
        for key in tensors
    )


def test_one_table_of_all_modules(tmp_path: Path) -> None:
    parts = make_parts(0)
    index = open_index(save_modules(tmp_path, parts, pickled="2_Dense"))
    assert [*index.entries] == [*sorted(parts[""]), *(f"2_Dense.{key}" for key in parts["2_Dense"])]
    assert index.files == ("model.safetensors", "2_Dense/pytorch_model.bin")
    assert index.config == {"model_type": "bert"}
    with CheckpointReader(index) as reader:
        read_back = reader.read("2_Dense.linear.weight").view(4, 8)
        assert torch.equal(read_back, parts["2_Dense"]["linear.weight"])


@pytest.mark.parametrize("main", ["", "0_Transformer"])
@pytest.mark.parametrize("pickled", ["", "2_Dense"])
@pytest.mark.parametrize("own_main", ["", "0_Transformer"])
def test_modules_are_merged_in_the_layout_of_the_base(
    main: str, pickled: str, own_main: str, tmp_path: Path
) -> None:
    base, *experts = (make_parts(seed, main) for seed in range(3))
    paths = {
        name: save_modules(
            tmp_path / name, {(own_main if f == main else f): t for f, t in parts.items()}
        )
        for name, parts in zip("ab", experts, strict=True)
    }
    save_modules(tmp_path / "base", base, pickled=pickled)
    out = tmp_path / "out"
    for donor in ("base", "a"):
        eutectic.merge(
            base=tmp_path / "base",
            experts=paths,
            method="average",
            output=out / donor,
            side_files=donor,
        )
        assert same(read(out / donor), mean(*experts))
        modules = json.loads((out / donor / "modules.json").read_text())
        assert [m["path"] for m in modules] == [main, "1_Pooling", "2_Dense"]
        assert json.loads((out / donor / main / "config.json").read_text())["model_type"] == "bert"
        assert (out / donor / "1_Pooling/config.json").is_file()


def test_a_dense_that_the_base_lacks_is_kept_per_expert(tmp_path: Path) -> None:
    base, a, b = (make_parts(seed) for seed in range(3))
    del base["2_Dense"]
    b["2_Dense"] = {"linear.weight": torch.ones(2, 8), "linear.bias": torch.ones(2)}
    paths = {name: save_modules(tmp_path / name, parts) for name, parts in (("a", a), ("b", b))}
    save_modules(tmp_path / "base", base)
    out = tmp_path / "out"
    eutectic.merge(base=tmp_path / "base", experts=paths, method="average", output=out)
    merged = {"": mean({"": a[""]}, {"": b[""]})[""]}
    assert same({"": read(out)[""]}, merged)
    assert not (out / "2_Dense").exists()
    for name, own in (("a", a), ("b", b)):
        assert same(read(out / "experts" / name), {**merged, "2_Dense": own["2_Dense"]})
        modules = json.loads((out / "experts" / name / "modules.json").read_text())
        assert modules[2]["path"] == "2_Dense"


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../b", "c:\\x", "./x", "x//y", 3])
def test_modules_elsewhere_are_refused(path: object, tmp_path: Path) -> None:
    save_modules(tmp_path, make_parts(0))
    (tmp_path / "modules.json").write_text(json.dumps([{"path": ""}, {"path": path}]))
    with pytest.raises(CheckpointError, match="not a plain path"):
        open_index(tmp_path)


def test_linked_modules_are_refused(tmp_path: Path) -> None:
    save_modules(tmp_path / "model", make_parts(0))
    (tmp_path / "model/2_Dense").rename(tmp_path / "2_Dense")
    (tmp_path / "model/2_Dense").symlink_to(tmp_path / "2_Dense")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        open_index(tmp_path / "model")


def test_weights_in_two_places_are_ambiguous(tmp_path: Path) -> None:
    save_modules(tmp_path, make_parts(0, "0_Transformer"))
    save_file(make_parts(1)[""], tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="One of them is stale"):
        open_index(tmp_path)


def test_the_modules_of_a_router_have_names_by_route(tmp_path: Path) -> None:
    """Asym called folders by random numbers; both forms mean the same modules."""
    query, document = ({"linear.weight": torch.full((4, 8), x)} for x in (1.0, 2.0))
    body = make_parts(0)[""]
    tables = []
    for root, ids, config in (
        (tmp_path / "asym", ("1401_Dense", "1402_Dense"), "config.json"),
        (tmp_path / "router", ("query_0_Dense", "document_0_Dense"), "router_config.json"),
    ):
        save_modules(root, {"": body, "2_Router": {}})
        (root / "2_Router/model.safetensors").unlink()
        (root / "2_Router/config.json").unlink()
        structure = {"query": [ids[0]], "document": [ids[1]]}
        types = dict.fromkeys(ids, "sentence_transformers.models.Dense")
        stated = {"types": types, "structure": structure, "parameters": {}}
        (root / "2_Router" / config).write_text(json.dumps(stated))
        for own, tensors in zip(ids, (query, document), strict=True):
            (root / "2_Router" / own).mkdir()
            save_file(tensors, root / "2_Router" / own / "model.safetensors")
        tables.append(list(open_index(root).entries))
    assert (
        tables[0]
        == tables[1]
        == [
            *sorted(body),
            "2_Router/query_0_Dense.linear.weight",
            "2_Router/document_0_Dense.linear.weight",
        ]
    )
    out = tmp_path / "out"
    eutectic.merge(
        base=tmp_path / "router",
        experts={"a": tmp_path / "asym"},
        method="average",
        output=out,
        side_files="a",
    )
    assert same(
        read(out)["2_Router/query_0_Dense"] and {"": read(out)["2_Router/query_0_Dense"]},
        {"": query},
    )
    assert json.loads((out / "2_Router/router_config.json").read_text())["structure"] == structure
    assert not (out / "2_Router/config.json").exists()


def test_a_resumed_run_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {n: save_modules(tmp_path / n, make_parts(s)) for s, n in enumerate(("base", "a", "b"))}
    base = paths.pop("base")
    options = {"base": base, "experts": paths, "method": "iso_c", "dtype": "bfloat16"}
    eutectic.merge(**options, output=tmp_path / "one", threads=1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("eutectic.execution.output_folder.write_folder", killed)
        eutectic.merge(**options, output=tmp_path / "two", threads=2)
    assert not (tmp_path / "two").exists()
    assert eutectic.merge(**options, output=tmp_path / "two", threads=2).resumed
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    assert "2_Dense/model.safetensors" in one and one == two
    hashes = json.loads((tmp_path / "one/eutectic.json").read_text())["tensors"]
    assert "2_Dense.linear.weight" in hashes


def test_a_changed_module_refuses_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {n: save_modules(tmp_path / n, make_parts(s)) for s, n in enumerate(("base", "a"))}
    options = {"base": paths["base"], "experts": {"a": paths["a"]}, "method": "average"}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("eutectic.execution.output_folder.write_folder", killed)
        eutectic.merge(**options, output=tmp_path / "out")
    save_file(make_parts(9)["2_Dense"], tmp_path / "a/2_Dense/model.safetensors")
    with pytest.raises(ResumeError):
        eutectic.merge(**options, output=tmp_path / "out")


def test_shards_stay_in_the_folder_of_their_module(tmp_path: Path) -> None:
    paths = {n: save_modules(tmp_path / n, make_parts(s)) for s, n in enumerate(("base", "a"))}
    out = tmp_path / "out"
    eutectic.merge(
        base=paths["base"],
        experts={"a": paths["a"]},
        method="average",
        output=out,
        shard_size="1KB",
    )
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*.safetensors*"))
    assert "2_Dense/model.safetensors" in written and "model.safetensors" in written
    assert set(open_index(out).entries) == set(open_index(paths["a"]).entries)


KEPT = ("assets/labels.txt", "config.json", "selected_tags.csv", "tokenizer.json")
LEFT = (
    *("checkpoint-5/", "model.gguf", "onnx/", "optimizer.pt", "pytorch_model.bin", "train.py"),
    *("training_args.bin", "vae/model.safetensors"),
)


def test_everything_else_of_a_model_is_taken_and_what_is_left_is_listed(tmp_path: Path) -> None:
    inside = ("checkpoint-5/config.json", "onnx/model.onnx", "onnx/config.json", ".cache/x")
    names = (*KEPT, *(n for n in LEFT if not n.endswith("/")), *inside, "model.safetensors")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(33 << 20)
    found = survey(tmp_path, ["model.safetensors"])
    assert found.taken == KEPT
    assert found.left == tuple(sorted((*LEFT, "huge.txt")))


def test_of_a_folder_that_is_no_model_only_known_files_are_taken(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "letters.txt", "photos/one.json", "model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert survey(tmp_path).taken == ("tokenizer.json",)
    assert survey(tmp_path).left == ()


def test_links_out_of_a_model_are_left_where_nobody_needs_them(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "data").symlink_to(tmp_path)
    assert survey(folder).left == ("data/", "notes.txt")
    assert side_files(folder) == ("config.json",)
