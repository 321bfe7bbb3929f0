"""Every model is scored by the classes of the head that it predicts with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import eutectic
from eutectic.errors import CheckpointError, TaskError
from eutectic.evaluation import pairs
from evaluation import world

LABELS = ("no", "maybe", "yes")
OTHER = ("yes", "no", "maybe")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An expert, the same model with its outputs and its classes in another order, and texts."""
    expert = world.make("bert", labels=LABELS, seed=7)
    world.save(expert, tmp_path / "expert")
    turned = world.make("bert", labels=OTHER, seed=7)
    rows = [LABELS.index(name) for name in OTHER]
    for name, values in expert.classifier.named_parameters():
        turned.classifier.get_parameter(name).data.copy_(values[rows])
    world.save(turned, tmp_path / "turned")
    world.save(expert.bert, tmp_path / "body")
    return tmp_path


def figures(folder: Path, answers: list[object], base: str = "turned", **spec: object):
    rows = [{"text": t, "label": n} for t, n in zip(world.sentences(40), answers, strict=True)]
    world.jsonl(folder / "d.jsonl", rows)
    path = world.tasks(
        folder / "t.yaml", a={"kind": "text-classification", "data": "d.jsonl", **spec}
    )
    found = eutectic.evaluate(
        path, base=folder / base, experts={"a": folder / "expert"},
        models={"turned": folder / "turned"}, resamples=0,
    )  # fmt: skip
    return {r.checkpoint: r.value for r in found.results}


def _config(file: Path, labels: tuple[str, ...]) -> None:
    values = json.loads(file.read_text())
    values["label2id"] = {name: i for i, name in enumerate(labels)}
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("number", [False, True], ids=["names", "numbers of the expert"])
def test_a_head_of_ones_own_has_classes_of_its_own(folder: Path, number: bool):
    answers = [i % 3 if number else LABELS[i % 3] for i in range(40)]
    found = figures(folder, answers)
    assert found["base"] == found["turned"] == found["a"] > 0
    # A body without a head takes the expert's, and its classes.
    assert figures(folder, answers, base="body")["base"] == found["a"]
    # Names in the task hold for every model; a lent head brings the expert's classes.
    if not number:
        assert figures(folder, answers, labels=list(LABELS))["base"] != found["a"]
        lent = figures(folder, answers, head_tensors=["score.*", "classifier.*"])
        assert lent["base"] == found["a"]
        with pytest.raises(TaskError, match="head_tensors: clasifier.*: no tensor of .*expert has"):
            figures(folder, answers, head_tensors=["clasifier.*"])  # would leave the base's own


def test_names_that_only_count_give_way_to_the_experts(folder: Path):
    answers: list[object] = [LABELS[i % 3] for i in range(40)]
    _config(folder / "turned" / "config.json", ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert figures(folder, answers)["a"] > 0  # the base is read by the expert's names


def test_classes_of_another_task_are_refused_with_the_way_out(folder: Path):
    _config(folder / "turned" / "config.json", ("good", "bad", "fair"))
    answers: list[object] = [LABELS[i % 3] for i in range(40)]
    message = r"(?s)\(10 faults\).*none of good, bad, fair.*of the head that 'base' predicts with"
    with pytest.raises(TaskError, match=message):
        figures(folder, answers)
    assert figures(folder, answers, head_tensors=["classifier.*"])["base"] > 0


def test_a_body_without_any_head_is_told_so_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    figures(folder, ["no"] * 40)  # writes the data and the tasks
    monkeypatch.setattr(pairs, "outputs", None)
    for models in ([folder / "body"], [folder / "turned", folder / "body"]):
        with pytest.raises(CheckpointError, match=r"body: .*classifier.*\n.*--expert a=PATH"):
            eutectic.evaluate(folder / "t.yaml", models=models, resamples=0)
