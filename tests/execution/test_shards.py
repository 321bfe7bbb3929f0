"""Guards `shard_size`: the same tensors in other files, heads' folders included.

A merge is compared with the one laid out like the base, tensor by tensor and by its hashes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import eutectic
from eutectic.checkpoint.index import open_index
from eutectic.errors import RecipeError, ResumeError
from helpers.cli import invoke
from helpers.folders import (
    digests,
    load,
    looks_finished,
    make_base,
    make_expert,
    save,
    save_sharded,
)
from helpers.models import forward, save_family

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in two shards and two experts with a head each, of different sizes."""
    folder = tmp_path_factory.mktemp("inputs")
    base = make_base()
    names = list(base)
    save_sharded(
        folder / "base",
        {
            "x-1.safetensors": {n: base[n] for n in names[:3]},
            "x-2.safetensors": {n: base[n] for n in names[3:]},
        },
    )
    for seed, name in enumerate("ab"):
        heads = {
            "classifier.weight": torch.full((seed + 2, 16), 1.0 + seed),
            "classifier.bias": torch.full((seed + 2,), 2.0 + seed),
        }
        save(folder / name, {**make_expert(base, seed), **heads})
    return folder


def merge(inputs: Path, output: Path, **options: Any) -> eutectic.MergeReport:
    experts = {name: inputs / name for name in "ab"}
    stated = {"method": "esm", "fallback": "allow", **options}
    return eutectic.merge(base=inputs / "base", experts=experts, output=output, **stated)


def sizes(folder: Path) -> dict[str, list[int]]:
    """Return weight file -> bytes of each of its tensors."""
    found: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.name] = [file.get_tensor(k).nbytes for k in file.keys()]  # noqa: SIM118
    return found


@pytest.mark.parametrize("size", [1, 130, 2100, "1GB"])
def test_the_same_tensors_in_shards_of_a_size(size: Any, inputs: Path, tmp_path: Path) -> None:
    merge(inputs, tmp_path / "like", dtype="bfloat16")
    merge(inputs, tmp_path / "shards", dtype="bfloat16", shard_size=size)
    bound = 1_000_000_000 if size == "1GB" else size
    for part in (".", "experts/a", "experts/b"):
        like, shards = load(tmp_path / "like" / part), load(tmp_path / "shards" / part)
        assert shards.keys() == like.keys()
        assert all(torch.equal(shards[k], like[k]) for k in like)
        for held in sizes(tmp_path / "shards" / part).values():
            assert sum(held) <= bound or len(held) == 1
        assert open_index(tmp_path / "shards" / part).entries.keys() == like.keys()
    made = {p: json.loads((tmp_path / p / "eutectic.json").read_text()) for p in ("like", "shards")}
    assert made["shards"]["tensors"] == made["like"]["tensors"]
    assert made["shards"]["recipe"].pop("shard_size") == bound
    assert made["shards"]["recipe"] == made["like"]["recipe"]
    names = sorted(sizes(tmp_path / "shards"))
    count = len(names)
    if size == "1GB":
        assert names == [SINGLE]
    else:
        assert names == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert (tmp_path / "shards" / INDEX).exists() == (count > 1)


def test_folders_of_experts_share_the_shards(inputs: Path, tmp_path: Path) -> None:
    merge(inputs, tmp_path / "out", shard_size=2100)
    for name in "ab":
        folder = tmp_path / "out/experts" / name
        own = [f for f, held in sizes(folder).items() if "classifier" in _first(folder / f)]
        assert len(own) == 1
        for file in sizes(folder).keys() - set(own):
            twin = file.replace(file[-17:], f"{len(sizes(tmp_path / 'out')):05d}.safetensors")
            assert (folder / file).samefile(tmp_path / "out" / twin)


def _first(file: Path) -> str:
    with safe_open(file, "pt") as opened:
        return next(iter(opened.keys()))


def test_heads_are_split_too(inputs: Path, tmp_path: Path) -> None:
    merge(inputs, tmp_path / "out", shard_size=100)
    held = sizes(tmp_path / "out/experts/b")
    assert {192, 12} <= {n for own in held.values() for n in own}
    assert all(sum(own) <= 100 or len(own) == 1 for own in held.values())


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_transformers_loads_the_shards(size: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base, experts = save_family("bert", tmp_path, 2, dtype=torch.float32)
    outputs: list[list[torch.Tensor]] = []
    for name, more in (("like", {}), ("shards", {"shard_size": size})):
        eutectic.merge(base=base, experts=experts, method="average", output=tmp_path / name, **more)
        model = transformers.BertForMaskedLM.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            outputs.append(forward("bert", model))
    assert all(torch.equal(x, y) for x, y in zip(*outputs, strict=True))
    assert (len(sizes(tmp_path / "shards")) > 1) == (size == "20KB")


def test_the_command_line(inputs: Path, tmp_path: Path) -> None:
    experts = [f"{name}={inputs / name}" for name in "ab"]
    words = ["--base", inputs / "base", "-m", "esm", "--shard-size", "2.1KB", *experts]
    words += ["--fallback", "allow"]
    planned = json.loads(invoke("plan", "--json", *words).out)
    assert invoke("merge", "-o", tmp_path / "out", *words).code == 0
    merge(inputs, tmp_path / "python", shard_size="2.1KB")
    assert digests(tmp_path / "out") == digests(tmp_path / "python")
    assert planned["files"] == len(sizes(tmp_path / "out")) > 2
    assert f"in {planned['files']} files" in invoke("plan", *words).out


@pytest.mark.parametrize("size", ["5 apples", "", 0, -1, 1.5, True, [1]])
def test_a_size_that_is_none(size: Any, inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="shard_size"):
        merge(inputs, tmp_path / "out", shard_size=size)
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_is_none_on_the_command_line(inputs: Path) -> None:
    words = ["--base", inputs / "base", "-m", "average", f"a={inputs / 'a'}", f"b={inputs / 'b'}"]
    answer = invoke("plan", "--shard-size", "5 apples", *words)
    assert answer.code == 2
    assert "--shard-size: must be a size such as 5GB, 512MiB or 800000" in answer.err
    assert "5 apples" in answer.err


def test_a_run_is_not_continued_with_other_shards(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    from eutectic.execution import output_folder

    def stopped(*_: object) -> None:
        raise RuntimeError

    with monkeypatch.context() as patched:
        patched.setattr(output_folder, "write_folder", stopped)
        with pytest.raises(RuntimeError):
            merge(inputs, tmp_path / "out", shard_size=2100)
    with pytest.raises(ResumeError, match="another request"):
        merge(inputs, tmp_path / "out", shard_size=4000)
    assert merge(inputs, tmp_path / "out", shard_size=2100).resumed
    assert looks_finished(tmp_path / "out")
    merge(inputs, tmp_path / "calm", shard_size=2100)
    assert digests(tmp_path / "out") == digests(tmp_path / "calm")
