"""Configurations and tokenizers that transformers is to load: loaded or refused in words."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.fuzzing import as_json, documents, mutated, outcome

from eutectic.evaluation.splits import open_processor
from eutectic.evaluation.task_files import Part, Task
from eutectic.models.loading import load_config, load_model, load_processor, load_stored
from eutectic.models.zero_shot import is_whole

pytestmark = pytest.mark.filterwarnings("ignore")
BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 6,
    "max_position_embeddings": 8,
    "id2label": {"0": "a", "1": "b"},
    "label2id": {"a": 0, "b": 1},
    "dtype": "float32",
    "attn_implementation": "eager",
    "auto_map": {"AutoModel": "own.M"},
}
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "[UNK]", "special": True, "single_word": False,
                      "lstrip": False, "rstrip": False, "normalized": False}],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"},
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "[UNK]",
    "pad_token": {"content": "[UNK]", "__type": "AddedToken"},
    "model_max_length": 16,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("loaded")
    config: Any = transformers.BertConfig(**{k: v for k, v in BERT.items() if k != "auto_map"})
    transformers.BertForSequenceClassification(config).save_pretrained(place)
    return place


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def asked(*_: object) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def put(folder: Path, **files: bytes) -> None:
    sound = {"config__json": as_json(BERT), "tokenizer__json": as_json(TOKENIZER)}
    sound["tokenizer_config__json"] = as_json(SETTINGS)
    for name, content in {**sound, **files}.items():
        (folder / name.replace("__", ".")).write_bytes(content)


def test_the_valid_ones_are_loaded(folder: Path) -> None:
    put(folder)
    assert load_config(folder).hidden_size == 8
    assert type(load_stored(folder)).__name__ == "BertForSequenceClassification"
    assert load_processor(folder, folder, images=False)("a")["input_ids"] == [1]


@settings(max_examples=500)
@given(documents(BERT))
def test_configurations(folder: Path, text: bytes) -> None:
    put(folder, config__json=text)
    outcome(lambda: load_model(folder, feeds=False))
    outcome(lambda: is_whole(folder))


@settings(max_examples=200)
@given(mutated({k: v for k, v in BERT.items() if k != "auto_map"}))
def test_models_as_stored(folder: Path, config: Any) -> None:
    put(folder, config__json=json.dumps(config).encode())
    outcome(lambda: load_stored(folder))


@settings(max_examples=500)
@given(st.one_of(documents(TOKENIZER), documents(SETTINGS).map(lambda text: text + b" ")))
def test_tokenizers(folder: Path, text: bytes) -> None:
    if text.endswith(b" "):
        put(folder, tokenizer_config__json=text)
    else:
        put(folder, tokenizer__json=text)
    outcome(lambda: load_model(folder))
    task = Task(name="t", kind="text-classification", data={"test": Part(path="x")})
    outcome(lambda: open_processor(task, folder))
