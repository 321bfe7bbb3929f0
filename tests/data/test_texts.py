"""`collect` and `evaluate` give a model the same tokens for the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eutectic.data.columns import Columns
from eutectic.data.encoded_rows import EncodedRows
from eutectic.evaluation import load_tasks, prepare
from evaluation import world


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("text-classification", "bert"),
        ("pair-classification", "bert"),
        ("sequence-to-sequence", "t5"),
        ("language-model", "gpt2"),
    ],
)
def test_the_same_tokens_for_the_same_rows(tmp_path: Path, kind: Any, model: str):
    texts = world.sentences(12)
    rows = [
        {"text": t, "text_pair": u, "source": t, "target": u, "label": i % 3}
        for i, (t, u) in enumerate(zip(texts, reversed(texts), strict=True))
    ]
    if kind != "pair-classification":
        rows = [{k: v for k, v in row.items() if k != "text_pair"} for row in rows]
    world.jsonl(tmp_path / "d.jsonl", rows)
    folder = world.save(world.make(model), tmp_path / "m")
    task = load_tasks(world.tasks(tmp_path / "t.yaml", a={"kind": kind, "data": "d.jsonl"}))["a"]
    ready = prepare(task, "test", folder, batch_size=5)
    for batch, chosen in zip(ready.batches, ready.order.split(5), strict=True):
        same = [rows[i] for i in chosen]
        (collected,) = EncodedRows(same, kind, ready.processor, Columns(), 5, 512)
        assert batch.keys() == collected.keys()
        assert all(torch.equal(batch[name], collected[name]) for name in batch)
