"""What a calibration of files keeps: bytes, resumption, the folder, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import eutectic
from calibration.world import inputs, load, make, outputs, save_world
from eutectic.errors import CheckpointError, NumericalError, RequestError, ResumeError
from eutectic.storage.local_disk import LocalDisk
from helpers.folders import digests

NAMES = "ab"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world("bert", tmp_path_factory.mktemp("world"))


def run(
    world: Path, output: Path, names: str = NAMES, **options: Any
) -> eutectic.CalibrationReport:
    experts = {name: world / name for name in names}
    data = {name: inputs("bert", NAMES.index(name), count=3) for name in names}
    merged = options.pop("merged", world / "merged")
    return eutectic.calibrate(
        merged, options.pop("experts", experts), options.pop("data", data), output, **options
    )


def test_bytes_depend_on_neither_threads_nor_the_order_of_tasks(
    world: Path, tmp_path: Path
) -> None:
    run(world, tmp_path / "one", threads=1)
    run(world, tmp_path / "two", names="ba", threads=4)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_batches_do_not_matter_but_for_rounding(world: Path, tmp_path: Path) -> None:
    def single(seed: int) -> list[dict[str, torch.Tensor]]:
        return [
            {key: value[i : i + 1] for key, value in batch.items()}
            for batch in inputs("bert", seed, count=3)
            for i in range(8)
        ]

    run(world, tmp_path / "one")
    run(world, tmp_path / "two", data={name: single(i) for i, name in enumerate(NAMES)})
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert all(torch.allclose(one[n], two[n], rtol=1e-4, atol=1e-5) for n in one)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 9, 18])
def test_a_killed_run_goes_on_with_the_same_bytes(after: int, world: Path, tmp_path: Path) -> None:
    calls: list[str] = []

    def kill(done: float, total: float, current: str) -> None:
        if done == after:
            raise _Killed

    def watch(done: float, total: float, current: str) -> None:
        calls.append(current)

    run(world, tmp_path / "whole")
    with pytest.raises(_Killed):
        run(world, tmp_path / "out", progress=kill)
    assert not (tmp_path / "out").exists()
    report = run(world, tmp_path / "out", progress=watch)
    assert report.resumed and len(calls) == (19 - after if after < 18 else 0)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_another_request_does_not_go_on(world: Path, tmp_path: Path) -> None:
    def kill(done: float, total: float, current: str) -> None:
        if done == 3:
            raise _Killed

    with pytest.raises(_Killed):
        run(world, tmp_path / "out", progress=kill)
    with pytest.raises(ResumeError, match="of another request"):
        run(world, tmp_path / "out", ridge=0.1)
    assert not run(world, tmp_path / "out", ridge=0.1, restart=True).resumed


def test_a_run_killed_after_its_model_was_moved_is_finished(world: Path, tmp_path: Path) -> None:
    from eutectic.calibration.unfinished_calibration import Unfinished

    def kill(unfinished: Unfinished) -> None:
        raise _Killed

    whole = run(world, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unfinished, "remove", kill)
        with pytest.raises(_Killed):
            run(world, tmp_path / "out")
    with pytest.raises(RequestError, match="is not empty"):
        run(world, tmp_path / "out", ridge=0.2)
    report = run(world, tmp_path / "out")
    assert report.resumed and report.layers == whole.layers
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_what_no_calibration_has_made_is_not_deleted(world: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    for name in ("notes.txt", ".hidden", "layer-notes.txt", "layer-00000.safetensors", "model/x"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("mine")
        for restart in (False, True):
            with pytest.raises(ResumeError, match="not an unfinished calibration"):
                run(world, tmp_path / "out", restart=restart)
        assert (work / name).read_text() == "mine"
        (work / name).unlink()
        if name == "model/x":
            (work / "model").rmdir()


def killed(*_: Any) -> None:
    raise _Killed


def test_a_strangers_file_in_the_unfinished_model(world: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalDisk, "commit", killed)
        with pytest.raises(_Killed):
            run(world, tmp_path / "out")
    mine = tmp_path / "out.partial/model/mine.txt"
    mine.write_text("mine")
    for restart in (False, True):
        with pytest.raises(ResumeError, match=r"holds mine\.txt, which no run wrote"):
            run(world, tmp_path / "out", restart=restart)
    mine.rename(tmp_path / "mine.txt")
    assert run(world, tmp_path / "out").resumed
    assert not (tmp_path / "out/mine.txt").exists() and not mine.parent.parent.exists()


def test_a_checkpoint_that_changes_is_named(world: Path, tmp_path: Path) -> None:
    models = shutil.copytree(world, tmp_path / "world")
    (file,) = (models / "a").glob("*.safetensors")

    def touch(done: float, total: float, current: str) -> None:
        os.utime(file)

    with pytest.raises(CheckpointError, match="expert 'a': changed while"):
        run(models, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_changes_is_named(world: Path, tmp_path: Path) -> None:
    models = shutil.copytree(world, tmp_path / "world")

    def touch(done: float, total: float, current: str) -> None:
        os.utime(models / "merged/config.json")

    with pytest.raises(CheckpointError, match="tokenizer of the merged model: changed while"):
        run(models, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out").exists()


def test_much_ridge_returns_the_anchor(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "merged", ridge=1e12)
    run(world, tmp_path / "base", ridge=1e12, anchor_scale=0, base=world / "base")
    for name, like in (("merged", world / "merged"), ("base", world / "base")):
        found = load_file(tmp_path / name / "model.safetensors")
        wanted = load_file(like / "model.safetensors")
        calibrated = [n for n in found if "embeddings.weight" not in n]
        assert all(torch.allclose(found[n], wanted[n], atol=1e-6) for n in calibrated)


def test_a_layer_is_what_the_formula_says(world: Path, tmp_path: Path) -> None:
    """Layer 1's query, from inputs that hooks show of the calibrated model and of the experts."""
    run(world, tmp_path / "out", ridge=0.07, expert_share=0.25)
    path = "encoder.layer.1.attention.self.query"
    total, right = 0.07 * torch.eye(16).double(), torch.zeros(16, 16).double()
    student = load("bert", tmp_path / "out")
    anchor = load("bert", world / "merged").get_submodule(path).weight.detach().double()
    for index, name in enumerate(NAMES):
        expert = load("bert", world / name)
        seen: dict[Any, list[torch.Tensor]] = {student: [], expert: []}
        for model, rows in seen.items():
            module = model.get_submodule(path)
            handle = module.register_forward_pre_hook(lambda m, a, rows=rows: rows.append(a[0]))
            for batch in inputs("bert", index, count=3):
                outputs("bert", model, batch)
                rows[-1] = rows[-1][batch["attention_mask"].bool()]
            handle.remove()
        x, z = (torch.cat(rows).double() for rows in seen.values())
        gram, mixed = x.T @ x, 0.75 * x + 0.25 * z
        weight = expert.get_submodule(path).weight.detach().double()
        total += gram / gram.norm()
        right += x.T @ mixed @ weight.T / gram.norm()
    wanted = torch.linalg.solve(total, right + 0.07 * anchor.T).T
    found = student.get_submodule(path).weight.detach().double()
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for_changes(world: Path, tmp_path: Path) -> None:
    old = load_file(world / "merged" / "model.safetensors")

    def changed(**options: Any) -> set[str]:
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        report = run(world, output, **options)
        new = load_file(output / "model.safetensors")
        found = {n for n in old if not torch.equal(old[n], new[n])}
        assert len(found) == sum(report.calibrated.values())
        return found

    assert all("LayerNorm" in n for n in changed(sites=["norms"]))
    biases = changed(sites=["biases"])
    assert biases and all(n.endswith("bias") and "LayerNorm" not in n for n in biases)
    assert changed(sites="matrices", layers="*.0.*query*") == {
        "encoder.layer.0.attention.self.query.weight"
    }


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters(world: Path, tmp_path: Path) -> None:
    """A LoRA adapter is the same expert as its dense form."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights=False)
    adapted = peft.get_peft_model(make("bert"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "dense")
    with pytest.raises(RequestError, match="adapters change the base"):
        run(world, tmp_path / "x", experts={"a": tmp_path / "adapter", "b": world / "b"})
    for name in ("adapter", "dense"):
        experts = {"a": tmp_path / name, "b": world / "b"}
        run(world, tmp_path / f"of-{name}", experts=experts, base=world / "base")
    one, two = (load_file(tmp_path / f"of-{n}" / "model.safetensors") for n in ("adapter", "dense"))
    assert all(torch.allclose(one[n], two[n], atol=1e-5) for n in one)


def test_the_folder_is_the_merged_model_s(tmp_path: Path) -> None:
    """Half precision, shards, experts' folders with heads, card and provenance of a merge."""
    base = make("bert")
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    for i, name in enumerate(NAMES, 1):
        expert = make("bert", i).to(torch.bfloat16)
        expert.classifier = torch.nn.Linear(16, i + 1, dtype=torch.bfloat16)
        expert.save_pretrained(tmp_path / name)
    experts = {name: tmp_path / name for name in NAMES}
    eutectic.merge(base=tmp_path / "base", experts=experts, method="average", output=tmp_path / "m")
    run(tmp_path, tmp_path / "out", merged=tmp_path / "m")

    def names(folder: Path) -> list[str]:
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())

    assert names(tmp_path / "out") == names(tmp_path / "m")
    changed = 0
    for shard in sorted((tmp_path / "m").glob("*.safetensors")):
        old, new = load_file(shard), load_file(tmp_path / "out" / shard.name)
        assert {n: (t.dtype, t.shape) for n, t in old.items()} == {
            n: (t.dtype, t.shape) for n, t in new.items()
        }
        changed += sum(not torch.equal(old[n], new[n]) for n in old)
    body = {n: t for f in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(f).items()}
    for name in NAMES:
        files = (tmp_path / "out" / "experts" / name).glob("*.safetensors")
        own = {n: t for f in files for n, t in load_file(f).items()}
        head = own.pop("classifier.weight")
        assert torch.equal(
            head, load_file(tmp_path / name / "model.safetensors")["classifier.weight"]
        )
        assert all(torch.equal(body[n], t) for n, t in own.items() if n in body)
        assert body.keys() <= own.keys()
    provenance = json.loads((tmp_path / "out" / "eutectic.json").read_text())
    before = json.loads((tmp_path / "m" / "eutectic.json").read_text())
    record = provenance["calibration"]
    assert provenance["recipe"] == before["recipe"]
    assert sum(record["calibrated"].values()) == changed
    assert sum("calibrated" in own for own in provenance["tensors"].values()) == changed
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith((tmp_path / "m" / "README.md").read_text().rstrip())
    assert "## Calibration" in card and "| a | 24 | 0 |" in card


def test_blocks_are_in_memory_only_while_passes_are_inside(world: Path, tmp_path: Path) -> None:
    """While a layer of a block is put in, the other blocks hold nothing."""
    from eutectic.calibration import streams

    held: list[int] = []
    put = streams.Stream.put

    def watch(stream: Any, name: str, values: torch.Tensor) -> None:
        if stream.model is not None and "encoder.layer" in name:
            blocks = stream.model.encoder.layer
            held.append(sum(any(p.numel() for p in block.parameters()) for block in blocks))
        put(stream, name, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams.Stream, "put", watch)
        run(world, tmp_path / "out")
    assert held and set(held) == {1}


def test_refusals(world: Path, tmp_path: Path) -> None:
    def refused(match: str, error: type[Exception] = RequestError, **options: Any) -> None:
        with pytest.raises(error, match=match):
            run(world, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused("ridge must be at least 0", ridge=-1)
    refused("ridge must be at least 0, and finite; got inf", ridge=float("inf"))
    refused("anchor_scale must be finite; got nan", anchor_scale=float("nan"))
    refused("data must be a mapping of the experts' names.*got str", data="rows.jsonl")
    refused("b must be the path of a folder; got Linear", experts={"b": torch.nn.Linear(2, 2)})
    refused("ridge must be a number; got 'big'", ridge="big")
    refused("samples must be a whole number; got 1.5", samples=1.5)
    refused("seed must have at most 64 bits", seed=2**70)
    refused("layers must be a list of strings; got 5", layers=5)
    for name, kind in {"ridge": "a number", "seed": "a whole number", "sites": "a list"}.items():
        refused(f"{name} must be {kind}.*; got None", **{name: None})
    refused("got 'matrixes'. Did you mean 'matrices'", sites="matrixes")
    refused("expert_share must be between", expert_share=1.5)
    refused("sites are .* 'matrixes'. Did you mean 'matrices'", sites=["matrixes"])
    refused("no option 'rigde'. Did you mean 'ridge'", rigde=1)
    refused("needs the base", anchor_scale=2)
    refused("a, b: no data", data={})
    refused("data of 'c', which is no expert", data={"c": []})
    refused("have no examples", data={"a": [], "b": []})
    refused("no layer to calibrate", layers=["nothing*"])
    refused("no such file or folder", CheckpointError, merged=tmp_path / "absent")
    nan = {"inputs_embeds": torch.full((2, 3, 16), float("nan"))}
    refused("NaN or Inf in the inputs", NumericalError, data={"a": [nan], "b": [nan]})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(RequestError, match="is not empty"):
        run(world, tmp_path / "full")


def test_an_expert_of_another_size_is_refused(world: Path, tmp_path: Path) -> None:
    from helpers.configs import tiny_model

    tiny_model("BertModel", vocab_size=50).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="another shape than the merged model's"):
        run(world, tmp_path / "out", experts={"a": tmp_path / "a", "b": world / "b"})
