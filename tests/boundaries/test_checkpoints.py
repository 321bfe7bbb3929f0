"""Checkpoints that are damaged or hostile are accepted or refused, never a traceback."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tests.helpers.fuzzing import as_json, damaged, documents, outcome, values

from eutectic.checkpoint.folder import survey
from eutectic.checkpoint.header import read_header
from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.opening import open_reader
from eutectic.execution.model_card import licence_of, written
from eutectic.planning.inputs import open_inputs
from eutectic.planning.plan import make_plan
from eutectic.recipes.load import check_recipe

CASES = settings(max_examples=500)
WEIGHTS = {
    "model.embed_tokens.weight": torch.ones(8, 4),
    "model.layers.0.q_proj.weight": torch.ones(4, 4),
    "model.layers.0.norm.weight": torch.ones(4),
    "lm_head.weight": torch.ones(8, 4),
}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "tie_word_embeddings": False,
    "vocab_size": 8,
    "torch_dtype": "float32",
    "id2label": {"0": "a", "1": "b"},
    "label2id": {"a": 0, "b": 1},
    "text_config": {"model_type": "llama", "tie_word_embeddings": True},
    "quantization_config": {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
    },
    "auto_map": {"AutoModel": "a.B"},
}
LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "rank_pattern": {"layers.0.*": 2},
    "alpha_pattern": {"q_proj": 4},
    "base_model_name_or_path": "base",
    "use_rslora": False,
    "modules_to_save": None,
    "task_type": "CAUSAL_LM",
}
FACTORS = {
    "base_model.model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 4),
    "base_model.model.model.layers.0.q_proj.lora_B.weight": torch.ones(4, 2),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boundaries")
    (folder / "base").mkdir()
    (folder / "base" / "model.safetensors").write_bytes(save(WEIGHTS))
    (folder / "other").mkdir()
    (folder / "other" / "model.safetensors").write_bytes(save(WEIGHTS))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(save(FACTORS))
    (folder / "adapter" / "adapter_config.json").write_bytes(as_json(LORA))
    return folder


def plan(base: Path, expert: Path) -> None:
    values = {"base": str(base), "experts": {"a": str(expert)}, "method": "average"}
    recipe = check_recipe(values)
    with open_inputs(recipe) as inputs:
        make_plan(recipe, inputs)


def test_the_valid_ones_are_accepted(place: Path) -> None:
    plan(place / "base", place / "adapter")
    (place / "base" / "config.json").write_bytes(as_json({**CONFIG, "quantization_config": None}))
    plan(place / "base", place / "other")
    (place / "base" / "config.json").unlink()


@CASES
@given(documents(CONFIG))
def test_configurations(place: Path, text: bytes) -> None:
    (place / "other" / "config.json").write_bytes(text)
    outcome(lambda: plan(place / "other", place / "base"))
    outcome(lambda: plan(place / "base", place / "other"))
    outcome(lambda: survey(place / "other"))
    (place / "other" / "config.json").unlink()


@CASES
@given(documents(LORA))
def test_configurations_of_adapters(place: Path, text: bytes) -> None:
    (place / "adapter" / "adapter_config.json").write_bytes(text)
    outcome(lambda: plan(place / "base", place / "adapter"))
    outcome(lambda: open_index(place / "adapter"))


HEADER = json.loads(save(WEIGHTS)[8:][: int.from_bytes(save(WEIGHTS)[:8], "little")])


@CASES
@given(documents(HEADER))
def test_headers(place: Path, text: bytes) -> None:
    path = place / "header.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 350)
    outcome(lambda: read_header(path))
    outcome(lambda: open_reader(path).close())


@CASES
@given(damaged(save(WEIGHTS)))
def test_files_of_tensors(place: Path, raw: bytes) -> None:
    path = place / "damaged.safetensors"
    path.write_bytes(raw)

    def read() -> None:
        with open_reader(path) as reader:
            for name in reader.entries:
                reader.read(name)

    outcome(read)


INDEX = {"metadata": {"total_size": 352}, "weight_map": dict.fromkeys(WEIGHTS, "a.safetensors")}


@CASES
@given(documents(INDEX))
def test_indices(place: Path, text: bytes) -> None:
    folder = place / "sharded"
    folder.mkdir(exist_ok=True)
    (folder / "a.safetensors").write_bytes(save(WEIGHTS))
    (folder / "model.safetensors.index.json").write_bytes(text)
    outcome(lambda: open_index(folder))


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"},
]
ROUTER = {"types": {"a": "x.Dense"}, "structure": {"query": ["a"]}, "parameters": {}}


@CASES
@given(documents(MODULES), documents(ROUTER), st.booleans())
def test_modules(place: Path, modules: bytes, router: bytes, routed: bool) -> None:
    folder = place / "modules"
    (folder / "1_Dense" / "a").mkdir(parents=True, exist_ok=True)
    for where in (folder, folder / "1_Dense"):
        (where / "model.safetensors").write_bytes(save(WEIGHTS))
    (folder / "modules.json").write_bytes(modules)
    (folder / "1_Dense" / "config.json").write_bytes(router if routed else b"{}")
    outcome(lambda: open_index(folder))
    outcome(lambda: survey(folder))


FRONT = b"---\nlicense: mit\ndate: 2024-02-30\ntags: [a, b]\nx: &a {y: 1}\nz: *a\n---\n# Title\n"


@CASES
@given(damaged(FRONT), values)
def test_cards(place: Path, text: bytes, value: Any) -> None:
    folder = place / "carded"
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_bytes(text)
    licence = licence_of(folder)
    assert licence == "unknown" or (licence.isprintable() and len(licence) <= 100)
    shown = written(value)
    assert "\n" not in shown and "<" not in shown and "\x1b" not in shown


@pytest.mark.skipif(os.name == "nt", reason="no such files there")
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "socket"])
@pytest.mark.parametrize(
    "name", ["base/model.safetensors", "base/config.json", "adapter/adapter_config.json"]
)
def test_special_files_are_refused_unopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    for folder in ("base", "adapter"):
        (tmp_path / folder).mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(save(WEIGHTS))
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(save(FACTORS))
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(as_json(LORA))
    path = tmp_path / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as own:
            monkeypatch.chdir(tmp_path)  # addresses of sockets are short
            own.bind(name)
    assert outcome(lambda: plan(tmp_path / "base", tmp_path / "adapter")) == "refused"


def test_a_card_without_a_date_that_exists_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\ndate: 2024-02-30\n---\n")
    assert licence_of(tmp_path) == "mit"
