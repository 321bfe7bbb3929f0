"""Bodies that borrow an expert's head, and experts that have none to lend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eutectic.errors import CheckpointError
from eutectic.evaluation import Task
from eutectic.models.task_models import (
    _head_parameters,
    borrows_head,
    checkpoint_tensors,
    head_tensors,
    lacking_head,
    load_model,
)

hf: Any = pytest.importorskip("transformers")
QUERY = "encoder.layer.0.attention.self.query"


def _config(labels: int = 2) -> Any:
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return hf.BertConfig(
        **sizes, intermediate_size=8, max_position_embeddings=16, num_labels=labels
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    hf.BertModel(_config()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _adapter(folder: Path) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A": torch.ones(1, 8), "lora_B": torch.ones(8, 1)}
    root = "base_model.model.bert."
    tensors = {f"{root}{QUERY}.{side}.weight": values for side, values in factors.items()}
    tensors |= {"base_model.model.classifier.weight": torch.ones(2, 8)}
    tensors |= {"base_model.model.classifier.bias": torch.zeros(2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _task(**fields: Any) -> Task:
    data = {"test": {"path": "rows.jsonl"}}
    return Task.model_validate({"name": "t", "kind": "text-classification", "data": data} | fields)


def test_a_body_takes_the_head_of_an_adapter(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "lora")
    task = _task()
    assert borrows_head(base, adapter, task, base)
    assert {"classifier.weight", "classifier.bias"} == head_tensors(adapter, base, task).keys()
    model = load_model(base, task, base=base, expert=adapter)
    state = model.state_dict()
    assert torch.equal(state["classifier.weight"], torch.ones(2, 8))
    own = checkpoint_tensors(base)[f"{QUERY}.weight"]
    assert torch.equal(state[f"bert.{QUERY}.weight"], own)
    adapted = checkpoint_tensors(adapter, base)[f"{QUERY}.weight"]
    assert torch.equal(adapted, own + 1)


def test_what_an_adapter_only_changes_is_no_head(base: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "lora")
    task = _task(head_tensors=[f"{QUERY}.*"])
    with pytest.raises(CheckpointError, match=f"lora: holds '{QUERY}.weight' as a change"):
        load_model(base, task, base=base, expert=adapter)


def test_a_head_is_looked_up_once_per_architecture(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merges of one base have one configuration but for names; an empty model is built for one."""
    copies = [shutil.copytree(base, tmp_path / f"merge{i}") for i in range(3)]
    for number, folder in enumerate(copies):
        written = json.loads((folder / "config.json").read_text())
        labels = {str(i): f"{number}{i}" for i in range(2)}
        (folder / "config.json").write_text(json.dumps(written | {"id2label": labels}))
    built: list[int] = []
    made: Any = hf.BertForSequenceClassification

    def counted(self: Any, config: Any, *, original: Any = made.__init__) -> None:
        built.append(config.num_labels)
        original(self, config)

    monkeypatch.setattr(made, "__init__", counted)
    _head_parameters.cache_clear()
    for folder in (base, *copies):
        for kind in ("text-classification", "regression"):
            found = lacking_head(folder, _task(kind=kind))
            assert found == ("classifier.bias", "classifier.weight")
    assert built == [2]
    hf.BertModel(_config(labels=3)).save_pretrained(tmp_path / "wider")
    assert lacking_head(tmp_path / "wider", _task()) and built == [2, 3]
