"""Guards that known spellings of one name meet and are told, and that two readings are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from eutectic.checkpoint.adapters import open_adapter
from eutectic.checkpoint.expert_tensors import Expert, full_expert
from eutectic.checkpoint.experts import common_base, open_expert
from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.names import align
from eutectic.checkpoint.reader import CheckpointReader, StateDictReader
from eutectic.errors import CheckpointError

LAYER = "layers.0.self_attn.q_proj.weight"
# One model as different versions write it: language model, output layer, vision, projector.
FILES = {
    "Qwen2-VL, files": ("model.", "lm_head.weight", "visual.blocks.0.attn.qkv.weight"),
    "Qwen2-VL, memory": (
        "model.language_model.",
        "lm_head.weight",
        "model.visual.blocks.0.attn.qkv.weight",
    ),
    "Qwen-Omni, files": (
        "thinker.model.",
        "thinker.lm_head.weight",
        "thinker.visual.blocks.0.attn.qkv.weight",
    ),
}
LLAVA = {
    "files": (
        "language_model.model.",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.",
    ),
    "4.52": ("model.language_model.", "lm_head.weight", "model.vision_tower.vision_model."),
    "5, memory": ("model.language_model.", "lm_head.weight", "model.vision_tower."),
    "5, without head": ("language_model.", None, "vision_tower."),
}


def llava(version: str) -> list[str]:
    language, head, vision = LLAVA[version]
    projector = "model." if vision.startswith("model.") else ""
    return [
        f"{language}{LAYER}",
        f"{language}embed_tokens.weight",
        f"{vision}encoder.layers.0.self_attn.q_proj.weight",
        f"{projector}multi_modal_projector.linear_1.weight",
        *([] if head is None else [head]),
    ]


def qwen(version: str) -> list[str]:
    language, head, vision = FILES[version]
    return [f"{language}{LAYER}", f"{language}norm.weight", head, vision]


@pytest.mark.parametrize("names", [qwen, llava])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "foo."])
def test_prefixes_of_vision_language_models(names, wrapper: str) -> None:
    versions = FILES if names is qwen else LLAVA
    for base in versions:
        for own in versions:
            keys = [wrapper + name for name in names(own)]
            mapping, _ = align(names(base), keys)
            pairs = zip(keys, names(base), strict=False)
            assert mapping == dict(pairs), (base, own)


def test_readings_are_told() -> None:
    _, alignment = align(qwen("Qwen2-VL, files"), qwen("Qwen2-VL, memory"))
    told = [(r.own, r.base, r.count) for r in alignment.readings]
    assert told == [("model.language_model.", "model.", 2), ("model.", "", 1)]
    assert "model.language_model. read as model. (2 tensors)" in str(alignment)


@pytest.mark.parametrize(
    ("spelt", "other"),
    [
        (
            "bert.encoder.layer.0.output.LayerNorm.gamma",
            "bert.encoder.layer.0.output.LayerNorm.weight",
        ),
        (
            "bert.encoder.layer.0.output.LayerNorm.beta",
            "bert.encoder.layer.0.output.LayerNorm.bias",
        ),
        ("h.0.ln_1.gamma", "h.0.ln_1.weight"),
        ("stem.bn1.beta", "stem.bn1.bias"),
        ("pos.conv.weight_g", "pos.conv.parametrizations.weight.original0"),
        ("pos.conv.weight_v", "pos.conv.parametrizations.weight.original1"),
        ("a._orig_mod.b._fsdp_wrapped_module.module.w", "a.b.w"),
        ("q.base_layer.weight", "q.weight"),
        ("score.modules_to_save.default.dense.weight", "score.dense.weight"),
        ("m.0.block_sparse_moe.gate.weight", "m.0.mlp.gate.weight"),
        ("m.0.block_sparse_moe.router.layer.weight", "m.0.mlp.router.weight"),
        ("text_model.model.layers.0.w", "model.text_model.layers.0.w"),
    ],
)
def test_equivalences(spelt: str, other: str) -> None:
    for base, own in ((spelt, other), (other, spelt)):
        mapping, alignment = align(["x.weight", base], ["x.weight", own])
        assert mapping == {"x.weight": "x.weight", own: base}
        assert alignment.readings
        assert all(read.count == 1 for read in alignment.readings)


def test_gamma_of_a_layer_scale_is_no_weight() -> None:
    mapping, _ = align(["stages.0.gamma", "x"], ["stages.0.weight", "x"])
    assert mapping == {"x": "x"}


def test_names_that_the_base_has_twice_meet_literally_only() -> None:
    base = ["model.norm.weight", "language_model.norm.weight"]
    mapping, _ = align(base, base)
    assert mapping == {name: name for name in base}
    mapping, _ = align([*base, "x"], ["norm.weight", "x"])
    assert mapping == {"x": "x"}


# --- checkpoints -----------------------------------------------------------------------------


def expert(base: dict[str, Tensor], own: dict[str, Tensor]) -> Expert:
    return full_expert(StateDictReader(own), StateDictReader(base).entries, "expert 'a'")


def test_two_keys_of_one_name() -> None:
    base = {"q.weight": torch.zeros(2, 2), "n": torch.zeros(2)}
    twice = {
        "q.weight": torch.ones(2, 2),
        "_orig_mod.q.weight": torch.ones(2, 2),
        "n": torch.ones(2),
    }
    found = expert(base, twice)
    assert found.alignment.copies == ("_orig_mod.q.weight",)
    assert not found.extra
    twice["_orig_mod.q.weight"] = torch.full((2, 2), 2.0)
    with pytest.raises(CheckpointError, match=r"'q.weight' and '_orig_mod.q.weight' both mean"):
        expert(base, twice)


def test_trained_module_wins_over_its_frozen_copy() -> None:
    base = {"score.weight": torch.zeros(2, 2), "n": torch.zeros(2)}
    own = {
        "base_model.model.score.original_module.weight": torch.zeros(2, 2),
        "base_model.model.score.modules_to_save.default.weight": torch.ones(2, 2),
        "base_model.model.n": torch.ones(2),
    }
    found = expert(base, own)
    assert found.read("score.weight").tolist() == [1.0] * 4
    assert not found.extra
    assert found.missing == ()


def test_unmerged_factors_are_refused() -> None:
    base = {"q.weight": torch.zeros(2, 2), "n": torch.zeros(2)}
    own = {
        "q.base_layer.weight": torch.zeros(2, 2),
        "q.lora_A.default.weight": torch.ones(1, 2),
        "q.lora_B.default.weight": torch.ones(2, 1),
        "n": torch.ones(2),
    }
    with pytest.raises(CheckpointError, match="2 factors of a LoRA adapter"):
        expert(base, own)


def test_extra_tensors_lose_their_wrappers() -> None:
    own = {"module.n": torch.ones(2), "module._orig_mod.classifier.weight": torch.ones(2, 2)}
    assert list(expert({"n": torch.zeros(2)}, own).extra) == ["classifier.weight"]


# --- adapters --------------------------------------------------------------------------------


def write(folder: Path, tensors: dict[str, Tensor], **config) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("module", ["model.language_model.", "base_model.model.model."])
@pytest.mark.parametrize("language", ["model.", "language_model.model.", "model.language_model."])
@pytest.mark.parametrize("named", ["", ".default", ".mine"])
def test_adapter_of_a_vision_language_model(
    tmp_path: Path, module: str, language: str, named: str
) -> None:
    at = f"base_model.model.{module}layers.0.self_attn.q_proj"
    a, b = torch.randn(1, 4), torch.randn(6, 1)
    tensors = {f"{at}.lora_A{named}.weight": a, f"{at}.lora_B{named}.weight": b}
    base = {f"{language}{LAYER}": torch.zeros(6, 4), "visual.x.weight": torch.zeros(2)}
    found = open_adapter(write(tmp_path / "a", tensors), StateDictReader(base).entries)
    delta = found.delta(f"{language}{LAYER}", base=torch.zeros(24), dtype=torch.float32)
    assert torch.equal(delta.view(6, 4), (2 * b) @ a)


def test_adapter_saved_from_a_wrapped_model(tmp_path: Path) -> None:
    at = "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.enc._orig_mod.q"
    head = "module.base_model.model.score"
    tensors = {
        f"{at}.lora_A.mine.weight": torch.ones(1, 4),
        f"{at}.lora_B.mine.weight": torch.ones(6, 1),
        f"{head}.original_module.weight": torch.zeros(2, 2),
        f"{head}.modules_to_save.mine.weight": torch.ones(2, 2),
    }
    base = {"enc.q.weight": torch.zeros(6, 4), "n": torch.zeros(2)}
    found = open_adapter(write(tmp_path / "a", tensors), StateDictReader(base).entries)
    assert list(found.entries) == ["enc.q.weight"]
    assert list(found.extra) == ["score.weight"]
    assert found.read_extra("score.weight").tolist() == [1.0] * 4


def test_two_adapters_in_one_file(tmp_path: Path) -> None:
    tensors = {f"base_model.model.q.lora_A.{name}.weight": torch.ones(1, 4) for name in "ab"}
    with pytest.raises(CheckpointError, match="holds the adapters a, b"):
        open_adapter(
            write(tmp_path / "x", tensors), StateDictReader({"q.weight": torch.zeros(6, 4)}).entries
        )


def test_base_with_base_layer(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.q.lora_A.weight": torch.ones(1, 4),
        "base_model.model.q.lora_B.weight": torch.ones(6, 1),
    }
    base = {"base_model.model.q.base_layer.weight": torch.zeros(6, 4)}
    found = open_adapter(write(tmp_path / "a", tensors), StateDictReader(base).entries)
    assert list(found.entries) == list(base)


@pytest.mark.parametrize("key", ["ia3_l", "ia3_l.default"])
def test_vectors_by_their_adapter_name(tmp_path: Path, key: str) -> None:
    save_file({"model.k.weight": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    paths = {}
    for name, value in (("a", 2.0), ("b", 3.0)):
        at = "base_model.model.model.k"
        own = {f"{at}.{key if name == 'a' else 'ia3_l'}": torch.full((3, 1), value)}
        paths[name] = write(tmp_path / name, own, peft_type="IA3")
    with CheckpointReader(open_index(tmp_path / "model.safetensors")) as reader:
        source, index = common_base(reader, paths)
        assert list(index.entries) == ["base_model.model.model.k.ia3_l"]
        for name, value in (("a", 2.0), ("b", 3.0)):
            found = open_expert(paths[name], index)
            assert found.read("base_model.model.model.k.ia3_l").tolist() == [value] * 3
            assert source.entries["base_model.model.model.k.ia3_l"].shape == (3, 1)
            found.close()


def test_extra_tensors_are_spelt_as_the_base_spells_their_module() -> None:
    body = {"norm.weight": torch.ones(2), "layers.0.w": torch.ones(2)}
    base = {f"language_model.model.{name}": t for name, t in body.items()}
    own = {f"model.language_model.{name}": t for name, t in body.items()}
    more = {"lm_head.weight": torch.ones(2, 2), "model.language_model.layers.1.w": torch.ones(2)}
    assert set(expert(base, own | more).extra) == {
        "language_model.lm_head.weight",
        "language_model.model.layers.1.w",
    }
    more = {"language_model.lm_head.weight": torch.ones(2, 2)}
    assert set(expert(own, base | more).extra) == {"lm_head.weight"}


@pytest.mark.parametrize("outer", ["policy.", "a.b."])
def test_own_names_around_the_whole_model(outer: str) -> None:
    base = [f"policy.{name}" for name in qwen("Qwen2-VL, files")]
    own = [outer + name for name in qwen("Qwen2-VL, memory")]
    mapping, alignment = align(base, own)
    assert mapping == dict(zip(own, base, strict=True))
    assert (alignment.strip, alignment.add) == (outer, "policy.")
    assert alignment.to_base(f"{outer}score.weight", base) == "policy.score.weight"


def test_adapter_of_single_matrices_on_a_packed_base(tmp_path: Path) -> None:
    at = "base_model.model.model.layers.0.mlp.experts.0.gate_proj"
    tensors = {f"{at}.lora_A.weight": torch.ones(1, 4), f"{at}.lora_B.weight": torch.ones(6, 1)}
    base = {"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 12, 4)}
    found = open_adapter(write(tmp_path / "a", tensors), StateDictReader(base).entries)
    change = found.delta(
        "model.layers.0.mlp.experts.gate_up_proj", base=torch.zeros(96), dtype=torch.float32
    ).view(2, 12, 4)
    assert change[0, :6].unique().tolist() == [found.config["lora_alpha"]]
    assert not change[0, 6:].any()
    assert not change[1].any()


def test_adapter_of_a_fused_matrix_on_a_base_that_keeps_its_parts(tmp_path: Path) -> None:
    at = "base_model.model.model.layers.0.self_attn.qkv_proj"
    tensors = {f"{at}.lora_A.weight": torch.ones(1, 4), f"{at}.lora_B.weight": torch.ones(8, 1)}
    attention = "model.layers.0.self_attn"
    base = {f"{attention}.{r}_proj.weight": torch.zeros(4 if r == "q" else 2, 4) for r in "qkv"}
    with pytest.raises(CheckpointError, match="packed otherwise: merge the adapter with peft"):
        open_adapter(write(tmp_path / "b", tensors), StateDictReader(base).entries)
