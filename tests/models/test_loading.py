"""The rules of the one loader: where from, which class, which dtype, no code, no noise left off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eutectic.errors import CheckpointError, RequestError
from eutectic.models.loading import load_model, load_stored, pretrained, quietly

hf: Any = pytest.importorskip("transformers")
SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def _bert(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    config = hf.BertConfig(**SIZES, intermediate_size=8, max_position_embeddings=16)
    model = hf.BertForSequenceClassification(config).to(dtype)
    model.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (folder / "vocab.txt").write_text("\n".join(words))
    hf.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return model


def test_running_is_in_float32_and_building_in_the_stored_dtype(tmp_path: Path) -> None:
    saved = _bert(tmp_path)
    run, stored = load_model(tmp_path).model, load_stored(tmp_path)
    assert {p.dtype for p in run.parameters()} == {torch.float32}
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    for name, values in saved.state_dict().items():
        assert torch.equal(run.state_dict()[name], values.to(run.state_dict()[name].dtype))


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (None, "BertForSequenceClassification"),
        ("text-classification", "BertForSequenceClassification"),
        ("pair_classification", "BertForSequenceClassification"),
        ("feature-extraction", "BertModel"),
        ("causal-lm", "BertLMHeadModel"),
        ("language-model", "BertLMHeadModel"),
    ],
)
def test_the_class_is_that_of_the_kind_of_task(tmp_path: Path, task: str | None, name: str) -> None:
    _bert(tmp_path)
    assert type(load_model(tmp_path, task=task).model).__name__ == name


def test_a_stored_class_can_be_replaced(tmp_path: Path) -> None:
    _bert(tmp_path)
    assert type(load_stored(tmp_path)) is hf.BertForSequenceClassification
    assert type(load_stored(tmp_path, hf.BertModel)) is hf.BertModel


def test_kinds_that_run_no_model_on_proxy_data_are_refused(tmp_path: Path) -> None:
    _bert(tmp_path)
    for kind in ("function", "lm-eval"):
        with pytest.raises(RequestError, match=f"unknown task '{kind}'"):
            load_model(tmp_path, task=kind)


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    _bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "of_its_own", "auto_map": {"AutoConfig": "own.Own"}}
    config |= {"architectures": ["OwnForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(CheckpointError):
        load_model(tmp_path, task="text-classification")
    with pytest.raises(CheckpointError):
        load_stored(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_put_back(tmp_path: Path, shown: bool) -> None:
    log = hf.utils.logging
    before = log.is_progress_bar_enabled()
    try:
        (log.enable_progress_bar if shown else log.disable_progress_bar)()
        model = _bert(tmp_path)
        state = model.state_dict()
        pretrained(type(model), None, config=model.config, state=state)
        assert log.is_progress_bar_enabled() is shown
        with pytest.raises(ValueError, match="fails"), quietly(hf):
            assert not log.is_progress_bar_enabled()
            raise ValueError("fails")
        assert log.is_progress_bar_enabled() is shown
    finally:
        (log.enable_progress_bar if before else log.disable_progress_bar)()
