"""Exported adapters load by PEFT's and transformers' Auto classes, wherever a program runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from eutectic.routed import build_routed, export_lora, routing
from helpers.configs import tiny_model

from .world import World, bert, clip_vision, llama, output, t5, texts, world

pytestmark = pytest.mark.filterwarnings("ignore")
peft: Any = pytest.importorskip("peft")


def classifier() -> World:
    return world(lambda: tiny_model("BertForSequenceClassification", num_labels=3), texts)


def pictures() -> World:
    make = lambda: tiny_model("ViTForImageClassification", num_labels=3)  # noqa: E731
    return world(make, clip_vision().batch)


def tokenizer(folder: Path) -> Any:
    """Save a tokenizer with a chat template, as a model's folder has it."""
    from tokenizers import Tokenizer, models

    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0, "yes": 1}, "[UNK]")),
        unk_token="[UNK]",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )
    made.save_pretrained(folder)
    return made


def processor(folder: Path) -> Any:
    made = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize(
    ("make", "loader"),
    [
        (llama, "AutoPeftModelForCausalLM"),
        (t5, "AutoPeftModelForSeq2SeqLM"),
        (classifier, "AutoPeftModelForSequenceClassification"),
        (bert, "AutoPeftModelForFeatureExtraction"),
        (pictures, "AutoPeftModel"),
    ],
)
def test_the_auto_class_of_the_architecture_loads_an_adapter_from_anywhere(
    make: Callable[[], World], loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = make()
    routed = build_routed(
        made.merged, made.state_dicts(), made.statistics(), made.statistics(True), rank=4
    )
    (tmp_path / "model").mkdir()
    saved = processor(tmp_path / "model") if make is pictures else tokenizer(tmp_path / "model")
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_lora(routed, "adapters", "../model")
    monkeypatch.chdir(tmp_path / "there")
    folder = "../here/adapters/experts/b"
    served = getattr(peft, loader).from_pretrained(folder).eval()
    batch = made.mixed(1)
    with routing(routed, mode="oracle", expert="b"):
        expected = output(routed, batch)
    torch.testing.assert_close(output(served, batch), expected, atol=1e-5, rtol=1e-4)
    for place in (folder, "../here/adapters/merged"):
        if make is pictures:
            assert transformers.AutoImageProcessor.from_pretrained(place).size == saved.size
            continue
        found = transformers.AutoTokenizer.from_pretrained(place)
        assert found.chat_template == saved.chat_template
        assert found("yes")["input_ids"] == [1]
