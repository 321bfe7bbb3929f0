"""Pairs are computed again when anything that decides them has changed, and only then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import eutectic
from eutectic.evaluation import pairs
from evaluation import world

LABELS = ("no", "maybe", "yes")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bare base, an expert with a head, and labelled texts."""
    rows = [{"text": t, "label": LABELS[i % 3]} for i, t in enumerate(world.sentences(40))]
    world.jsonl(tmp_path / "texts.jsonl", rows)
    world.save(world.make("encoder"), tmp_path / "base")
    world.save(world.make("bert", seed=7), tmp_path / "expert")
    world.tasks(tmp_path / "tasks.yaml", a={"kind": "text-classification", "data": "texts.jsonl"})
    return tmp_path


def _edit(file: Path, change) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def _swapped_words(values) -> None:
    vocabulary = values["model"]["vocab"]
    words = [word for word in vocabulary if word.startswith("w")]
    numbers = [vocabulary[word] for word in words]
    vocabulary.update(zip(words, reversed(numbers), strict=True))


def _other_labels(values) -> None:
    values["label2id"] = {"yes": 0, "no": 1, "maybe": 2}


CHANGES = {
    "tokenizer of both": ("tokenizer.json", ("base", "expert"), _swapped_words, 2),
    "tokenizer of one": ("tokenizer.json", ("expert",), _swapped_words, 1),
    "classes": ("config.json", ("expert",), _other_labels, 2),
    "lending configuration": ("config.json", ("expert",), lambda v: v.update(hidden_act="relu"), 2),
    "unread file": ("notes.json", ("expert",), lambda v: v.update(a=1), 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_a_pair_is_part_of_its_identity(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    calls: list[int] = []
    original = pairs.outputs
    monkeypatch.setattr(pairs, "outputs", lambda *a, **k: calls.append(1) or original(*a, **k))
    (folder / "expert" / "notes.json").write_text("{}")

    def evaluate(output: str):
        calls.clear()
        return eutectic.evaluate(
            folder / "tasks.yaml", base=folder / "base", experts={"a": folder / "expert"},
            output=folder / output, resamples=10,
        )  # fmt: skip

    before = evaluate("r.json")
    assert len(calls) == 2
    file, where, change, wanted = CHANGES[name]
    for place in where:
        _edit(folder / place / file, change)
    after = evaluate("r.json")
    assert len(calls) == wanted
    assert after.results == evaluate("fresh.json").results
    assert (after.results != before.results) == (wanted > 0)


def test_the_image_processor_is_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    original = pairs.outputs
    monkeypatch.setattr(pairs, "outputs", lambda *a, **k: calls.append(1) or original(*a, **k))
    world.save(world.make("vit"), tmp_path / "m")
    world.images(tmp_path / "i", 6)
    path = world.tasks(tmp_path / "t.yaml", a={"kind": "image-classification", "data": "i"})
    for wanted in (1, 1, 2):
        if wanted == 2:
            file = tmp_path / "m" / "preprocessor_config.json"
            _edit(file, lambda v: v.update(image_mean=[0.1, 0.1, 0.1]))
        eutectic.evaluate(path, models=[tmp_path / "m"], output=tmp_path / "r.json", resamples=0)
        assert len(calls) == wanted


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks by names that are going away
def test_an_adapters_base_is_part_of_it(tmp_path: Path):
    peft = pytest.importorskip("peft")
    model = world.make("bert")
    world.save(model, tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    rows = [{"text": t, "label": LABELS[i % 3]} for i, t in enumerate(world.sentences(40))]
    world.jsonl(tmp_path / "texts.jsonl", rows)
    spec = {"kind": "text-classification", "data": "texts.jsonl"}
    tasks = world.tasks(tmp_path / "t.yaml", a=spec)

    def evaluate(output: str):
        return eutectic.evaluate(
            tasks, base=tmp_path / "base", experts={"a": tmp_path / "a"},
            output=tmp_path / output, resamples=0,
        ).results  # fmt: skip

    before = evaluate("r.json")
    world.save(world.make("bert", seed=3), tmp_path / "base")
    after = evaluate("r.json")
    assert after == evaluate("fresh.json") != before
