"""Collecting, merging with statistics, evaluating and inspecting: from a store, to a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from eutectic.storage import local_path
from helpers.cli import invoke
from helpers.object_store import BUCKET, SECRET, Proxy, names, upload

pytest.importorskip("transformers")

AT = f"s3://{BUCKET}/verbs"


def _world(folder: Path) -> None:
    """Save a base, two experts with a tokenizer, rows, and a file of tasks."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(28))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", model_max_length=24
    )
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**size, intermediate_size=32, vocab_size=30, max_position_embeddings=24)
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02 * seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"text": f"w{i} w{i + 1} w{i % 5}", "label": i % 2} for i in range(20)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"kind": "text-classification", "data": {"test": "rows.jsonl"}}
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"tasks": {"a": task}}))


def _run(cache: Path, *words: object) -> str:
    told = invoke(*words)
    assert told.code == 0, told.err
    assert SECRET not in told.out + told.err
    assert str(cache) not in told.out + told.err
    return told.out


def test_verbs_from_a_store_to_a_store(tmp_path: Path, store: Any, s3: Proxy) -> None:
    _world(tmp_path)
    for name in ("base", "a", "b", "rows.jsonl", "tasks.yaml"):
        upload(store, tmp_path / name, f"verbs/{name}")
    cache = tmp_path / "cache"
    figures: dict[str, Any] = {}
    for at in (AT, str(tmp_path)):
        for name in ("a", "b"):
            statistics = f"{at}/{name}.stats.safetensors"
            _run(cache, "collect", f"{at}/{name}", "--data", f"{at}/rows.jsonl", "-o", statistics)
        given = [f"--statistics={n}={at}/{n}.stats.safetensors" for n in ("a", "b")]
        experts = [f"a={at}/a", f"b={at}/b"]
        made = ["--base", f"{at}/base", "-m", "regmean", *given, *experts]
        _run(cache, "merge", *made, "-o", f"{at}/merged")
        models = ["--base", f"{at}/base", "-e", f"a={at}/a", f"merged={at}/merged"]
        _run(cache, "evaluate", *models, "-t", f"{at}/tasks.yaml", "-o", f"{at}/results.json")
        file = local_path(f"{at}/results.json")
        found = json.loads(file.read_bytes())
        figures[at] = [(r["checkpoint"], r["value"]) for r in found["results"]]
        assert str(cache) not in file.read_text()
    assert figures[AT] == figures[str(tmp_path)]
    assert len(figures[AT]) == 3
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        sent = store.get_object(Bucket=BUCKET, Key=f"verbs/merged/{name}")["Body"].read()
        if name != "model.safetensors":
            assert sent == (tmp_path / "merged" / name).read_bytes()
    assert "verbs/results.json" in names(store, "verbs/")


def test_deltas_are_kept_on_a_disk(tmp_path: Path, store: Any) -> None:
    told = invoke(
        "tune", "--base", "b", "-m", "iso_c", "a=x", "c=y", "--search=norm", "--work", f"{AT}/work"
    )
    assert told.code == 2
    assert "deltas are kept on a disk" in told.err
