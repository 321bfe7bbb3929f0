"""`eutectic check` answers for any folder: whatever lies there is a finding, never an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tests.helpers.fuzzing import as_json, damaged, documents, mutated, outcome

import eutectic
from eutectic.vocabulary.tokens import read_tokens

from .test_checkpoints import CONFIG, FACTORS, HEADER, INDEX, LORA, WEIGHTS

CASES = settings(max_examples=500)
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 7, "content": "</s>", "special": True, "lstrip": False}],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}
UNIGRAM: dict[str, Any] = {
    "added_tokens": [],
    "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5]]},
}
SETTINGS: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": {"content": "</s>", "__type": "AddedToken"},
    "pad_token": "</s>",
    "added_tokens_decoder": {"7": {"content": "</s>", "special": True}},
    "additional_special_tokens": ["ab"],
    "chat_template": [{"name": "default", "template": "{{ messages }}"}],
}
GENERATION: dict[str, Any] = {"eos_token_id": [2, 7], "pad_token_id": 0, "max_length": 20}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checked")
    write(folder / "base")
    write(folder / "whole")
    return folder


def write(folder: Path, **files: bytes) -> Path:
    """Write a sound checkpoint, but for the files that are given; `__` stands for a dot."""
    folder.mkdir(exist_ok=True)
    plain = {**CONFIG, "quantization_config": None}
    sound = {
        "model.safetensors": save(WEIGHTS),
        "config.json": as_json(plain),
        "tokenizer.json": as_json(TOKENIZER),
        "tokenizer_config.json": as_json(SETTINGS),
        "generation_config.json": as_json(GENERATION),
    }
    for name, content in {**sound, **{k.replace("__", "."): v for k, v in files.items()}}.items():
        (folder / name).write_bytes(content)
    return folder


def checked(folder: Path, base: Path | None = None) -> None:
    """Check a folder, and write what is found as the command line does."""
    (one,) = eutectic.check(folder, base=base, values=True)
    assert json.dumps(one.as_json(), default=str).encode("utf-8", "backslashreplace")


def test_what_is_sound(place: Path) -> None:
    (report,) = eutectic.check(place / "whole", values=True)
    assert not report.faults


@CASES
@given(
    st.one_of(
        documents(CONFIG).map(lambda text: {"config__json": text}),
        documents(SETTINGS).map(lambda text: {"tokenizer_config__json": text}),
        documents(GENERATION).map(lambda text: {"generation_config__json": text}),
        documents(TOKENIZER).map(lambda text: {"tokenizer__json": text}),
        documents(UNIGRAM).map(lambda text: {"tokenizer__json": text}),
        documents(HEADER).map(
            lambda text: {
                "model__safetensors": len(text).to_bytes(8, "little") + text + b"\0" * 350
            }
        ),
        damaged(save(WEIGHTS)).map(lambda raw: {"model__safetensors": raw}),
    )
)
def test_checkpoints(place: Path, files: dict[str, bytes]) -> None:
    checked(write(place / "odd", **files))


@settings(max_examples=50)
@given(documents(CONFIG), documents(TOKENIZER))
def test_folders_beside_each_other(place: Path, config: bytes, tokenizer: bytes) -> None:
    odd = write(place / "beside", config__json=config, tokenizer__json=tokenizer)
    for order in ((odd, place / "base"), (place / "base", odd)):
        assert len([*eutectic.check(*order)]) == 2


@CASES
@given(documents(INDEX))
def test_shards(place: Path, text: bytes) -> None:
    folder = write(place / "sharded")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(text)
    checked(folder)


@CASES
@given(st.one_of(documents(LORA), st.none()), st.one_of(damaged(save(FACTORS)), st.none()))
def test_adapters(place: Path, config: bytes | None, factors: bytes | None) -> None:
    folder = place / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(as_json(LORA) if config is None else config)
    raw = save(FACTORS) if factors is None else factors
    (folder / "adapter_model.safetensors").write_bytes(raw)
    checked(folder, place / "base")


@CASES
@given(st.one_of(mutated(TOKENIZER), mutated(UNIGRAM)).map(as_json), documents(SETTINGS))
def test_tokenizers(place: Path, tokenizer: bytes, stated: bytes) -> None:
    folder = place / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    (folder / "tokenizer_config.json").write_bytes(stated)
    outcome(lambda: read_tokens(folder))


@CASES
@given(
    documents({"a": 0, "b": 1}),
    documents({"<x>": 2}),
    documents({"eos_token": {"content": "a"}, "additional_special_tokens": ["<y>"]}),
)
def test_tokenizers_in_parts(place: Path, vocab: bytes, added: bytes, special: bytes) -> None:
    folder = place / "parts"
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_bytes(vocab)
    (folder / "added_tokens.json").write_bytes(added)
    (folder / "special_tokens_map.json").write_bytes(special)
    outcome(lambda: read_tokens(folder))


PIECES = b"".join(
    b"\x0a" + bytes([len(text) + 7]) + b"\x0a" + bytes([len(text)]) + text + b"\x15\0\0\0\0"
    for text in (b"<unk>", b"a", b"\xe2\x96\x81b")
)


@CASES
@given(damaged(PIECES))
def test_sentencepiece_models(place: Path, raw: bytes) -> None:
    folder = place / "pieces"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(raw)
    outcome(lambda: read_tokens(folder))


@CASES
@given(st.binary(max_size=40))
def test_vocabularies_of_lines(place: Path, raw: bytes) -> None:
    folder = place / "lines"
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_bytes(raw)
    outcome(lambda: read_tokens(folder))


def test_a_value_that_is_not_finite_in_every_dtype(place: Path) -> None:
    folder = place / "values"
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2):
        held = {**WEIGHTS, "model.layers.0.q_proj.weight": torch.ones(4, 4).to(dtype)}
        held["model.layers.0.q_proj.weight"].view(-1)[5] = float("nan")
        write(folder, model__safetensors=save(held))
        (report,) = eutectic.check(folder, values=True)
        kinds = [fault.kind for fault in report.faults]
        assert "not_finite" in kinds, (dtype, report.wrong)
        assert "first at 5" in report.wrong[-1]
