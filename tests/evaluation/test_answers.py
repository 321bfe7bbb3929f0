"""What is refused before it becomes a figure: labels, pairs, poolers, tokenizers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import eutectic
from eutectic.errors import CheckpointError, RequestError, TaskError
from eutectic.evaluation import load_tasks, prepare
from eutectic.evaluation.pairs import call_function
from eutectic.evaluation.splits import split_rows
from evaluation import world

LABELS = ("no", "maybe", "yes")


def _classified(folder: Path, *labels: Any, **more: Any):
    rows = [{"text": t, "label": n} for t, n in zip(world.sentences(len(labels)), labels)]  # noqa: B905
    world.jsonl(folder / "d.jsonl", rows)
    spec = {"kind": "text-classification", "data": "d.jsonl", **more}
    path = world.tasks(folder / "t.yaml", a=spec)
    return eutectic.evaluate(path, models=[folder / "m"], resamples=0).results[0]


@pytest.mark.parametrize("head", [False, True])
def test_labels_outside_the_classes_are_refused(tmp_path: Path, head: bool):
    more: dict[str, Any] = {}
    world.save(world.make("encoder" if head else "bert"), tmp_path / "m")
    if head:  # its classes are those of the head, whatever the configuration says
        values = {"weight": torch.randn(3, 16), "bias": torch.zeros(3)}
        save_file(values, tmp_path / "h.safetensors")
        more = {"head": "h.safetensors"}
    assert _classified(tmp_path, 0, 1, 2, **more).n == 3
    with pytest.raises(TaskError, match=r"row 2: the label -1 is none of"):
        _classified(tmp_path, 0, -1, 2, **more)
    with pytest.raises(TaskError, match=r"row 3: the label 3 is none of the model's 3 classes"):
        _classified(tmp_path, 0, 1, 3, **more)
    with pytest.raises(TaskError, match=r"row 1: the label 3 is none of no, maybe, yes"):
        _classified(tmp_path, 3, 1, 0, labels=list(LABELS), **more)


@pytest.mark.parametrize("value", ["nan", "inf", None])
def test_numbers_to_predict_are_finite(tmp_path: Path, value: Any):
    world.save(world.make("bert", labels=("score",)), tmp_path / "m")
    rows = [{"text": t, "label": i} for i, t in enumerate(world.sentences(4))]
    world.jsonl(tmp_path / "d.jsonl", [*rows, {"text": "w1", "label": value}])
    path = world.tasks(tmp_path / "t.yaml", a={"kind": "regression", "data": "d.jsonl"})
    with pytest.raises(RequestError, match="row 5"):
        eutectic.evaluate(path, models=[tmp_path / "m"], resamples=0)


@pytest.mark.parametrize("kind", ["text-classification", "regression"])
@pytest.mark.parametrize("pairs", [("w1", None), (None, "w1")])
def test_pairs_in_some_rows_only_are_refused(tmp_path: Path, kind: str, pairs: tuple[Any, Any]):
    rows = [{"text": "w2", "text_pair": p, "label": 0} for p in pairs]
    world.jsonl(tmp_path / "d.jsonl", rows)
    world.save(world.make("bert"), tmp_path / "m")
    path = world.tasks(tmp_path / "t.yaml", a={"kind": kind, "data": "d.jsonl"})
    without, with_it = pairs.index(None) + 1, pairs.index("w1") + 1
    with pytest.raises(RequestError, match=f"row {without} has no 'text_pair', row {with_it} has"):
        eutectic.evaluate(path, models=[tmp_path / "m"], resamples=0)


@pytest.mark.parametrize("order", [("mean", "pooler"), ("pooler", "mean")])
def test_a_missing_pooler_is_missed_whatever_runs_before(tmp_path: Path, order: tuple[str, str]):
    folder = world.save(world.make("encoder"), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in state.items() if "pooler" not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    values = {"weight": torch.randn(3, 16), "bias": torch.zeros(3)}
    save_file(values, tmp_path / "h.safetensors")
    rows = [{"text": t, "label": i % 3} for i, t in enumerate(world.sentences(6))]
    world.jsonl(tmp_path / "d.jsonl", rows)
    spec = {"kind": "text-classification", "data": "d.jsonl", "head": "h.safetensors"}
    first, second = ({**spec, "pooling": pooling} for pooling in order)
    path = world.tasks(tmp_path / "t.yaml", a=first, b=second)
    with pytest.raises(CheckpointError, match=r"needs tensors .*pooler"):
        eutectic.evaluate(path, models=[folder], resamples=0)
    both = world.tasks(tmp_path / "m.yaml", a={**spec, "pooling": "mean"}, b=spec)
    assert len(eutectic.evaluate(both, models=[folder], resamples=0).results) == 2


@pytest.mark.parametrize("left", [None, {}, {"tokenizer_class": "T5Tokenizer"}], ids=str)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, left: dict[str, str] | None):
    folder = world.save(world.make("bert"), tmp_path / "m")
    for file in folder.glob("*token*"):
        file.unlink()
    if left is not None:  # from this alone transformers makes a tokenizer that knows no word
        (folder / "tokenizer_config.json").write_text(json.dumps(left))
    world.jsonl(tmp_path / "d.jsonl", [{"text": "w1", "label": 0}])
    path = world.tasks(tmp_path / "t.yaml", a={"kind": "text-classification", "data": "d.jsonl"})
    with pytest.raises(CheckpointError, match="no .*tokenizer"):
        prepare(load_tasks(path)["a"], "test", folder)


def test_texts_of_one_token_alone_are_refused(tmp_path: Path):
    model = world.make("gpt2")
    folder = world.save(model, tmp_path / "m")
    world.tokenizer(end="").save_pretrained(folder)
    world.jsonl(tmp_path / "d.jsonl", [{"text": "w1"}, {"text": "w2"}])
    spec = {"kind": "language-model", "data": "d.jsonl", "metric": "perplexity"}
    path = world.tasks(tmp_path / "t.yaml", a=spec)
    with pytest.raises(RequestError, match="none of the 2 texts has a token that is predicted"):
        eutectic.evaluate(path, models=[folder], resamples=5)
    # Beside others, they have no loss and count for nothing.
    longer = "w1 w2 w1 w2"
    world.jsonl(tmp_path / "d.jsonl", [{"text": "w1"}, {"text": longer}, {"text": "w2"}])
    found = eutectic.evaluate(path, models=[folder], resamples=5).results[0]
    world.jsonl(tmp_path / "d.jsonl", [{"text": longer}])
    alone = eutectic.evaluate(path, models=[folder], resamples=5).results[0]
    assert found.value == pytest.approx(alone.value, rel=1e-5)
    with pytest.raises(TaskError, match=r"line \d+: tasks.a: max_length must be at least 2"):
        load_tasks(world.tasks(tmp_path / "t.yaml", a={**spec, "max_length": 1}))


def _function(tmp_path: Path, code: str):
    (tmp_path / "f.py").write_text(code)
    world.jsonl(tmp_path / "d.jsonl", [{"text": "w1"}])
    spec = {"kind": "function", "function": "f.py:f", "data": "d.jsonl"}
    task = load_tasks(world.tasks(tmp_path / "t.yaml", a=spec))["a"]
    return call_function(task, tmp_path, [{"text": "w1"}], None, trust_code=True)


def test_files_of_functions_are_whole_modules(tmp_path: Path):
    code = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: float\n"
        "def f(folder, rows):\n    return [A(VALUE).x for _ in rows]\n"
    )
    for value in (0.5, 0.25):  # the file's present content each time
        found = _function(tmp_path, code.replace("VALUE", str(value)))
        assert found.predictions.tolist() == [value]
    with pytest.raises(RequestError, match=r"'.*f.py:f' cannot be imported: .*f.py, line 1"):
        _function(tmp_path, "def f(folder, rows:\n")
    assert not math.isnan(_function(tmp_path, "def f(folder, rows): return [1]\n").predictions[0])


@pytest.mark.parametrize("kind", ["text-classification", "regression"])
def test_a_named_column_of_second_texts_is_meant_to_be_there(tmp_path: Path, kind: str):
    rows = [{"text": "w1", "hypothesis": "w2", "label": 0}]
    world.jsonl(tmp_path / "d.jsonl", rows)
    for name, found in (("hypothesis", True), ("hypotesis", False)):
        spec = {"kind": kind, "data": "d.jsonl", "columns": {"text_pair": name}}
        task = load_tasks(world.tasks(tmp_path / "t.yaml", a=spec))["a"]
        if found:
            assert split_rows(task, "test") == rows
        else:
            with pytest.raises(RequestError, match="row 1 has no column 'hypotesis'"):
                split_rows(task, "test")


def test_only_an_expert_is_the_expert(tmp_path: Path):
    texts = world.sentences(12)
    rows = [{"text": t, "label": ("no", "maybe", "yes")[i % 3]} for i, t in enumerate(texts)]
    world.jsonl(tmp_path / "d.jsonl", rows)
    spec = {"kind": "text-classification", "data": "d.jsonl"}
    tasks = world.tasks(tmp_path / "t.yaml", a=spec)
    models = {n: world.save(world.make("bert", seed=i), tmp_path / n) for i, n in enumerate("ab")}
    found = eutectic.evaluate(tasks, models=models, resamples=0)
    assert [r.normalized for r in found.results] == [None, None]
    found = eutectic.evaluate(
        tasks, experts={"a": models["a"]}, models={"b": models["b"]}, resamples=0
    )
    assert found.results[0].normalized == 1


def test_an_expert_below_its_base_is_told(tmp_path: Path):
    base = world.make("bert")
    texts = world.sentences(12)
    tokenizer = world.tokenizer()
    with torch.no_grad():
        best = [int(base(**tokenizer(t, return_tensors="pt")).logits.argmax()) for t in texts]
    rows = [
        {"text": t, "label": ("no", "maybe", "yes")[i]} for t, i in zip(texts, best, strict=True)
    ]
    world.jsonl(tmp_path / "d.jsonl", rows)
    tasks = world.tasks(tmp_path / "t.yaml", a={"kind": "text-classification", "data": "d.jsonl"})
    folders = {
        "base": world.save(base, tmp_path / "base"),
        "experts": {"a": world.save(world.make("bert", seed=3), tmp_path / "a")},
    }
    found = eutectic.evaluate(tasks, **folders, resamples=0)
    assert found.results[0].value == 1 > found.results[1].value
    assert len(found.notes) == 1 and "NAI is not meaningful here: a (" in found.notes[0]
    world.save(base, tmp_path / "a")
    world.save(world.make("bert", seed=3), tmp_path / "base")
    assert eutectic.evaluate(tasks, **folders, resamples=0).notes == ()
