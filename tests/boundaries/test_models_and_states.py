"""Routed folders, models, GGUF files, recipes of mergekit, states of runs: accepted or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tests.helpers.fuzzing import as_json, damaged, documents, mutated, outcome

import eutectic
from eutectic.calibration.unfinished_calibration import open_unfinished
from eutectic.drafting.draft import draft
from eutectic.errors import EutecticError
from eutectic.recipes.load import load_recipe
from eutectic.routed.routed_folder import load_routed
from eutectic.statistics.tensor_file import write_tensors
from eutectic.storage import announce, folder_aside

from .test_checkpoints import CONFIG, WEIGHTS

CASES = settings(max_examples=500)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


# --- Routed folders ---


class Layer(torch.nn.Module):
    """A model of one layer that can be routed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's outputs."""
        return self.fc1(x)


@pytest.fixture(scope="module")
def routed(place: Path) -> dict[str, bytes]:
    """The files of a routed model."""
    from eutectic.types import LayerStatistics

    torch.manual_seed(0)
    model = Layer()
    experts = {
        name: {k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()}
        for name in "ab"
    }
    sums = {
        "gram": torch.eye(4),
        "count": 8,
        "input_sum": torch.ones(4),
        "pooled_sum": torch.ones(4),
    }
    sums |= {"pooled_gram": torch.eye(4), "sample_count": 8}
    statistics = {name: {"fc1.weight": LayerStatistics(**sums)} for name in "ab"}
    made = eutectic.build_routed(model, experts, statistics, rank=2, layers=["fc1.weight"])
    made.save_pretrained(place / "routed")
    return {path.name: path.read_bytes() for path in (place / "routed").iterdir()}


def opened(place: Path, files: dict[str, bytes]) -> None:
    folder = place / "odd"
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    model = load_routed(folder, model=Layer())
    with torch.no_grad():
        model(torch.ones(2, 4))


def test_the_routed_folder_is_accepted(place: Path, routed: dict[str, bytes]) -> None:
    opened(place, routed)


@CASES
@given(st.data())
def test_descriptions(place: Path, routed: dict[str, bytes], data: st.DataObject) -> None:
    text = data.draw(documents(json.loads(routed["routed.json"])))
    outcome(lambda: opened(place, {**routed, "routed.json": text}))


@CASES
@given(st.data())
def test_factors_and_weights(place: Path, routed: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["routed.safetensors", "model.safetensors"]))
    raw = routed[name]
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    if data.draw(st.booleans()):
        text = as_json(data.draw(mutated(header)))
        raw = len(text).to_bytes(8, "little") + text + raw[8 + length :]
    else:
        raw = data.draw(damaged(raw))
    outcome(lambda: opened(place, {**routed, name: raw}))


# --- Merges to their end ---


@settings(max_examples=150)
@given(documents({**CONFIG, "quantization_config": None, "text_config": None}))
def test_merges(place: Path, config: bytes) -> None:
    for name in ("base", "a"):
        (place / name).mkdir(exist_ok=True)
        (place / name / "model.safetensors").write_bytes(save(WEIGHTS))
    (place / "base" / "config.json").write_bytes(config)
    for name in ("out", "out.partial"):
        shutil.rmtree(place / name, ignore_errors=True)
    asked: dict[str, Any] = {"base": str(place / "base"), "experts": {"a": str(place / "a")}}
    how = {"method": "average", "output": place / "out", "threads": 1, "dtype": "bfloat16"}
    made = outcome(lambda: eutectic.merge(**asked, **how)) == "accepted"
    assert (place / "out").exists() is made
    assert not made or not (place / "out.partial").exists()


# --- Recipes of mergekit ---

MERGEKIT: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "dtype": "bfloat16",
    "out_dtype": "float32",
    "slices": [
        {
            "sources": [
                {
                    "model": "a",
                    "layer_range": [0, 1],
                    "parameters": {"weight": [0.1, 0.5], "density": 0.5},
                },
                {"model": "b", "layer_range": [0, 1]},
            ],
            "parameters": {"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]},
        }
    ],
    "parameters": {"normalize": True, "int8_mask": True},
    "tokenizer": {"source": "union", "tokens": {"<x>": {"source": "a"}}, "pad_to_multiple_of": 8},
    "chat_template": "auto",
}
PLAIN: dict[str, Any] = {
    "models": [{"model": "a", "parameters": {"weight": 0.3}}, {"model": "b"}],
    "merge_method": "dare_ties",
    "base_model": {"model": {"path": "base", "revision": None}},
    "tokenizer_source": "base",
    "modules": None,
}


@CASES
@given(
    st.one_of(
        mutated(MERGEKIT).map(lambda value: json.dumps(value).encode()),
        mutated(PLAIN).map(lambda value: json.dumps(value).encode()),
        damaged(json.dumps(MERGEKIT, indent=1).encode()),
        damaged(json.dumps(PLAIN, indent=1).encode()),
    )
)
def test_configurations_of_mergekit(place: Path, text: bytes) -> None:
    for name in ("base", "a", "b"):
        (place / name).mkdir(exist_ok=True)
    (place / "mergekit.yaml").write_bytes(text)
    outcome(lambda: load_recipe(place / "mergekit.yaml"))


# --- GGUF ---


@pytest.fixture(scope="module")
def gguf_file(place: Path) -> bytes:
    """A small GGUF file."""
    gguf = pytest.importorskip("gguf")
    path = place / "small.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(4)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    for name, shape in {"token_embd.weight": (2, 4), "blk.0.attn_q.weight": (4, 4)}.items():
        writer.add_tensor(name, torch.ones(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@CASES
@given(st.data())
def test_gguf_files(place: Path, gguf_file: bytes, data: st.DataObject) -> None:
    from eutectic.checkpoint.opening import open_reader

    path = place / "damaged.gguf"
    path.write_bytes(data.draw(damaged(gguf_file)))

    def read() -> None:
        with open_reader(path) as reader:
            for name in reader.entries:
                reader.read(name)

    outcome(read)


# --- States of runs that were killed ---


@CASES
@given(st.data())
def test_unfinished_calibrations(place: Path, data: st.DataObject) -> None:
    folder = place / "calibrated.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / "layer-00000.safetensors"
    record = {"identity": "me", "place": "fc", "record": {"error": 0.5}}
    if data.draw(st.booleans()):
        written = data.draw(mutated(record))
        text = json.dumps(written)
        path.write_bytes(save({"fc.weight": torch.ones(2)}, {"eutectic_calibration": text}))
    else:
        write_tensors(path, {"fc.weight": torch.ones(2)}, "eutectic_calibration", record)
        path.write_bytes(data.draw(damaged(path.read_bytes())))

    def take_up() -> None:
        found = open_unfinished(folder, "me", restart=False)
        found.lock.release()

    outcome(take_up)


@CASES
@given(damaged(b'{"eutectic_unfinished": "0123456789abcdef"}'), st.booleans())
def test_marks_of_folders_aside(place: Path, mark: bytes, begun: bool) -> None:
    output = place / "aside"
    work = place / "aside.partial"
    shutil.rmtree(work, ignore_errors=True)
    (work / "folder").mkdir(parents=True)
    (work / "unfinished.json").write_bytes(mark)

    def take_up() -> None:
        with folder_aside(output, {"a": 1}, "last") as aside:
            if begun:
                with aside.writing() as folder:
                    announce(folder / "last")
                    (folder / "last").write_text("x")
                raise EutecticError("stopped")

    outcome(take_up)
    assert not output.exists()


# --- Recipes that are drafted from what lies in folders ---


CLASSES: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "id2label": {"0": "a", "1": "b"},
    "problem_type": "single_label_classification",
}


@settings(max_examples=200)
@given(st.one_of(documents(CONFIG), documents(CLASSES)), documents({"text": "a", "label": 1}))
def test_drafts(place: Path, config: bytes, row: bytes) -> None:
    for name in ("one", "two"):
        folder = place / "drafted" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").write_bytes(save(WEIGHTS))
        (folder / "config.json").write_bytes(config if name == "one" else b"{}")
    (place / "drafted" / "two.jsonl").write_bytes(row + b"\n")
    outcome(lambda: draft([place / "drafted" / "one", place / "drafted" / "two"]))
