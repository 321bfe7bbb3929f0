"""Folders of routed models: exact round trips, plain transformers, and damaged files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from eutectic.errors import CheckpointError, OutputError, RequestError
from eutectic.routed import build_routed, export_lora, load_routed, routing
from eutectic.routed.routed_folder import save_routed

from .world import EXPERTS, WORLDS, TorchEncoder, World, bert, counted, output, torch_encoder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def build(world: World, **options) -> nn.Module:
    return build_routed(world.merged, world.state_dicts(), world.statistics(), rank=4, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "clip"])
def test_saving_and_loading_changes_nothing(kind: str, dtype: torch.dtype, tmp_path: Path):
    world = WORLDS[kind]()
    routed = build(world).to(dtype)
    routed.save_pretrained(tmp_path)
    loaded = load_routed(tmp_path)
    assert type(loaded) is type(routed)
    ours, theirs = routed.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
    batch = world.mixed()
    if dtype == torch.bfloat16 and "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
    for mode in ("route", "base"):
        with routing(routed, mode=mode), routing(loaded, mode=mode):  # type: ignore[arg-type]
            assert torch.equal(output(routed, batch), output(loaded, batch))
    assert vars(routed.routing) == vars(loaded.routing)
    assert sorted(p.name for p in tmp_path.iterdir() if "generation" not in p.name) == [
        "config.json",
        "model.safetensors",
        "routed.json",
        "routed.safetensors",
    ]


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_tied_models_are_loaded_into_a_model_of_ones_own(kind: str, tmp_path: Path):
    world = WORLDS[kind]()
    routed = build(world)
    routed.save_pretrained(tmp_path)
    other = copy.deepcopy(world.merged)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    loaded = load_routed(tmp_path, model=other)
    with routing(routed, mode="route"), routing(loaded, mode="route"):
        assert torch.equal(output(routed, world.mixed()), output(loaded, world.mixed()))
    with pytest.raises(CheckpointError, match=r"does not fit Linear: missing|unknown"):
        load_routed(tmp_path, model=nn.Linear(3, 3))


def test_plain_transformers_loads_the_merged_model(tmp_path: Path):
    from transformers import BertModel

    world = bert()
    build(world).save_pretrained(tmp_path)
    plain = BertModel.from_pretrained(tmp_path)
    ours, theirs = world.merged.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert type(load_routed(tmp_path, BertModel)) is BertModel


def test_state_dicts_go_round(tmp_path: Path):
    world = bert()
    routed, other = build(world), build(world)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(routed.state_dict())
    batch = world.mixed()
    assert torch.equal(counted(other, batch), counted(routed, batch))


def test_models_that_are_not_of_transformers(tmp_path: Path):
    world = torch_encoder()
    routed = build(world, layers=["*in_proj_weight", "*linear?.weight"])
    routed.save_pretrained(tmp_path)
    loaded = load_routed(tmp_path, TorchEncoder(True).eval())
    assert all(not m.use_nested_tensor for m in loaded.modules() if hasattr(m, "use_nested_tensor"))
    batch = world.mixed()
    assert torch.equal(counted(loaded, batch), counted(routed, batch))
    with pytest.raises(CheckpointError, match="does not fit Linear"):
        load_routed(tmp_path, nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="config.json"):
        load_routed(tmp_path)


def test_damage_is_reported(tmp_path: Path):
    world = bert()
    build(world).save_pretrained(tmp_path)
    good = json.loads((tmp_path / "routed.json").read_text())

    def write(**changes) -> None:
        (tmp_path / "routed.json").write_text(json.dumps({**good, **changes}))

    write(router="other")
    with pytest.raises(CheckpointError, match="damaged"):
        load_routed(tmp_path)
    write(format=99)
    with pytest.raises(CheckpointError, match="update eutectic"):
        load_routed(tmp_path)
    write(layers=[{"name": "no.weight", "path": "no"}])
    with pytest.raises(CheckpointError, match=r"'no\.weight' is not in BertModel"):
        load_routed(tmp_path)
    write(layers=[{"name": 3}])
    with pytest.raises(CheckpointError, match="damaged"):
        load_routed(tmp_path)
    write(experts=["a", "b"])
    with pytest.raises(CheckpointError, match="factors of shapes"):
        load_routed(tmp_path)
    write()
    tensors = load_file(tmp_path / "routed.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "routed.safetensors")
    with pytest.raises(CheckpointError, match="incomplete"):
        load_routed(tmp_path)
    (tmp_path / "routed.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_routed(tmp_path)
    (tmp_path / "routed.json").unlink()
    with pytest.raises(CheckpointError, match="not a routed model"):
        load_routed(tmp_path)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
@pytest.mark.filterwarnings("ignore")
def test_peft_serves_the_exported_experts_side_by_side(kind: str, tmp_path: Path):
    from peft import PeftModel

    world = WORLDS[kind]()
    routed = build(world)
    export_lora(routed, tmp_path)
    base = type(world.merged).from_pretrained(tmp_path / "merged")  # type: ignore[attr-defined]
    served = PeftModel.from_pretrained(base, tmp_path / "experts" / "a", adapter_name="a").eval()
    for name in EXPERTS[1:]:
        served.load_adapter(tmp_path / "experts" / name, adapter_name=name)
    batch = world.mixed(2)
    names = [EXPERTS[i] for i in world.labels(2)]
    with routing(routed, mode="oracle", expert=names):
        expected = output(routed, batch)
    found = output(served, {**batch, "adapter_names": names})  # type: ignore[dict-item]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_exported_routers_decide_as_the_routed_model(tmp_path: Path):
    from safetensors import safe_open

    world = bert()
    routed = build(world)
    export_lora(routed, tmp_path)
    layer = "encoder.layer.0.attention.self.query"
    seen: list[torch.Tensor] = []
    handle = world.merged.get_submodule(layer).register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    batch = world.mixed()
    output(world.merged, batch)
    handle.remove()
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = (seen[0] * mask).sum(1) / mask.sum(1)
    with safe_open(tmp_path / "prototypes.safetensors", "pt") as file:
        assert json.loads(file.metadata()["experts"]) == list(EXPERTS)
        assert file.metadata()["router"] == "discriminant"
        scores = pooled @ file.get_tensor(f"{layer}.weight").T + file.get_tensor(f"{layer}.bias")
    with routing(routed, record=True) as decisions:
        output(routed, batch)
    assert torch.equal(scores.argmax(1), decisions[f"{layer}.weight"])


@pytest.mark.filterwarnings("ignore")
def test_the_documented_router_serves_a_mixed_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    world = bert()
    routed = build(world)
    export_lora(routed, tmp_path / "adapters")
    page = (Path(__file__).parents[2] / "docs" / "routing.md").read_text("utf-8")
    serving = page.split("## Serving")[1]
    code = serving.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/routing.md", "exec"), names)
    batch = world.mixed(3)
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1
    chosen = names["choose"](batch)
    with routing(routed, record=True) as decisions:
        output(routed, batch)
    assert chosen == [EXPERTS[t] for t in decisions[f"{names['LAYER']}.weight"]]
    assert set(chosen) == set(EXPERTS)
    with routing(routed, mode="oracle", expert=chosen), torch.no_grad():
        expected = output(routed, batch)
    found = names["answer"](batch).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_exported_is_refused(tmp_path: Path):
    routed = build(torch_encoder(), layers=["*in_proj_weight"])
    with pytest.raises(RequestError, match="no LoRA form"):
        export_lora(routed, tmp_path)
    with pytest.raises(RequestError, match="not a routed model"):
        export_lora(bert().merged, tmp_path)


@pytest.mark.parametrize("write", [save_routed, export_lora])
def test_a_full_disk_is_told_of_in_words_and_leaves_nothing(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    routed = build(bert())
    write(routed, tmp_path / "whole")
    assert "Writing" not in capfd.readouterr().err  # the bar of transformers

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr(type(routed), "save_pretrained", full)
    with pytest.raises(OutputError, match="cannot be written: the disk is full: "):
        write(routed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
