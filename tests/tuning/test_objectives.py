"""Searches that run models: what is measured in memory is what the written model gives."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml

import eutectic
from eutectic.errors import NumericalError, RequestError
from eutectic.evaluation.model_outputs import outputs, score
from eutectic.evaluation.splits import prepare
from eutectic.evaluation.task_files import load_tasks
from eutectic.models.task_models import load_model
from eutectic.tuning import feature_distance, kl_divergence, objectives

pytest.importorskip("transformers")
from tuning import world  # noqa: E402 - after the check that transformers is there

FEW = {"points": 5, "tolerance": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.build(tmp_path_factory.mktemp("world"))


def options(folder, search, method="iso_c", tasks="tasks.yaml", **more):
    return {
        "base": folder / "base",
        "experts": {name: folder / name for name in world.CLASSES},
        "method": method,
        "scale": {"search": search, "tasks": folder / tasks, **FEW, **more},
    }


def written(folder, output, split, tasks="tasks.yaml"):
    """Return task -> (prepared, outputs of the expert, outputs of the written model)."""
    found = {}
    for name, task in load_tasks(folder / tasks).items():
        prepared = prepare(task, split, folder / "base")
        expert = outputs(load_model(folder / name, task), prepared)
        found[name] = (prepared, expert, outputs(load_model(output, task), prepared))
    return found


RULES = (
    {"match": "encoder.layer.0.*", "scale": 0.3},
    {"match": "embeddings.*", "treatment": "copy"},
)


@pytest.mark.parametrize(
    "more", [{}, {"tensors": RULES}, {"method": "average"}, {"dtype": "bfloat16"}], ids=str
)
def test_validation(tmp_path, folder, more):
    report = eutectic.merge(**{**options(folder, "validation"), **more}, output=tmp_path / "out")
    search = json.loads((tmp_path / "out" / "eutectic.json").read_text())["search"]
    assert search == report.search
    assert search["experts"] == {"left": 1.0, "right": 1.0}
    best = next(p for p in search["points"] if p["scale"] == report.scale)
    assert math.isclose(best["value"], sum(best["parts"].values()) / 2)
    assert best["value"] == max(p["value"] for p in search["points"])
    found = written(folder, tmp_path / "out", "validation")
    for name, (prepared, _, merged) in found.items():
        assert score(merged, prepared).value == best["parts"][name]
        assert search["tasks"][name]["data_hash"] == prepared.data_hash
        assert search["tasks"][name]["disjoint"] == {"proxy": 24, "validation": 24, "test": 24}
    assert "chosen by validation on the validation splits of left, right" in report.notes[-1]


@pytest.mark.parametrize("more", [{}, {"tensors": RULES}], ids=str)
def test_divergence(tmp_path, folder, more):
    report = eutectic.merge(**options(folder, "divergence"), **more, output=tmp_path / "out")
    best = next(p for p in report.search["points"] if p["scale"] == report.scale)
    for name, (_, expert, merged) in written(folder, tmp_path / "out", "proxy").items():
        assert math.isclose(best["parts"][name], kl_divergence(expert, merged), rel_tol=1e-3)
    assert best["value"] == min(p["value"] for p in report.search["points"])
    assert "experts" not in report.search


def test_features_of_encoders(tmp_path, folder):
    request = options(folder, "divergence", compare="features")
    report = eutectic.merge(**request, output=tmp_path / "out")
    assert report.search["compare"] == "features"
    best = next(p for p in report.search["points"] if p["scale"] == report.scale)
    found = written(folder, tmp_path / "out", "proxy", "heads.yaml")
    for name, (_, expert, merged) in found.items():
        assert math.isclose(best["parts"][name], feature_distance(expert, merged), rel_tol=1e-3)


def test_outer_heads_share_one_model(tmp_path, folder, monkeypatch):
    loaded = []
    real = objectives.share_bodies

    def noted(models, shapes):
        loaded.append((models, real(models, shapes)))
        return loaded[-1][1]

    monkeypatch.setattr(objectives, "share_bodies", noted)
    for tasks in ("tasks.yaml", "heads.yaml"):
        eutectic.tune(**options(folder, "divergence", tasks=tasks))
    (_, own), (models, outer) = loaded
    assert len(outer) == 1 and models[0] is models[1]
    (first, _), (second, keys) = own
    assert keys == {}  # everything is held by the first
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert first.get_parameter(name).data_ptr() == second.get_parameter(name).data_ptr()
    assert first.classifier.weight.shape != second.classifier.weight.shape


def test_one_expert_is_found_at_one(folder):
    request = options(folder, "divergence", method="average", range=(0.25, 4.0))
    request["experts"] = {"left": folder / "left"}
    tasks = yaml.safe_load((folder / "tasks.yaml").read_text())["tasks"]
    (folder / "one.yaml").write_text(yaml.safe_dump({"tasks": {"left": tasks["left"]}}))
    request["scale"]["tasks"] = folder / "one.yaml"
    request["scale"]["tolerance"] = 0.02
    report = eutectic.tune(**request)
    assert abs(report.scale - 1) < 0.03
    assert min(p["value"] for p in report.search["points"]) < 1e-3


def test_measurements_are_kept(tmp_path, folder, monkeypatch):
    request = options(folder, "validation")
    first = eutectic.tune(**request, work=tmp_path / "work")
    with monkeypatch.context() as patch:
        patch.setattr(objectives, "_objective", None)  # no model is loaded again
        again = eutectic.tune(**request, work=tmp_path / "work")
    assert again == first
    finer = eutectic.tune(**request, search={"tolerance": 0.1}, work=tmp_path / "work")
    assert {p["scale"] for p in first.search["points"]} < {
        p["scale"] for p in finer.search["points"]
    }
    other = eutectic.tune(**request, search={"search": "divergence"}, work=tmp_path / "work")
    assert other.search["search"] == "divergence"
    with pytest.raises(RequestError, match="holds an unfinished merge of another request"):
        eutectic.tune(**{**request, "method": "ties"}, work=tmp_path / "work")


def test_an_interrupted_search_goes_on(tmp_path, folder, monkeypatch):
    request = {**options(folder, "validation"), "output": tmp_path / "out"}
    real, calls = objectives._metric, []

    def interrupted(*words):
        calls.append(words)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*words)

    with monkeypatch.context() as patch:
        patch.setattr(objectives, "_metric", interrupted)
        with pytest.raises(KeyboardInterrupt):
            eutectic.merge(**request)
    calls.clear()
    monkeypatch.setattr(objectives, "_metric", lambda *w: calls.append(w) or real(*w))
    report = eutectic.merge(**request)
    assert report.resumed
    assert len(calls) == 2 * (len(report.search["points"]) - 2)  # two α were finished
    plain = eutectic.tune(**{k: v for k, v in request.items() if k != "output"})
    assert plain.search == report.search


def test_an_overflowing_model_is_the_worst(folder, monkeypatch):
    real = objectives._divergence

    def overflowing(task, expert, model):
        if not overflowing.fine:
            raise NumericalError("NaN")
        return real(task, expert, model)

    overflowing.fine = False
    monkeypatch.setattr(objectives, "_divergence", overflowing)
    with pytest.raises(NumericalError, match="no finite value"):
        eutectic.tune(**options(folder, "divergence"))


def edited(folder, change):
    tasks = yaml.safe_load((folder / "tasks.yaml").read_text())
    change(tasks["tasks"])
    (folder / "edited.yaml").write_text(yaml.safe_dump(tasks))
    return "edited.yaml"


FAULTS = [
    (lambda t: t["left"]["data"].pop("validation"), "'left' has no split 'validation'"),
    (lambda t: t["left"].update(expert="lefty"), "belongs to 'lefty', which is none of"),
    (
        lambda t: t["left"]["data"].update(validation="again.jsonl"),
        "validation and test share 24 of 24",
    ),
    (
        lambda t: t["left"].update(kind="function", function="json:loads"),
        "is of the kind function, which reads its data itself",
    ),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=range(len(FAULTS)))
def test_faults_come_before_any_work(tmp_path, folder, change, message):
    (folder / "again.jsonl").write_bytes((folder / "left.test.jsonl").read_bytes())
    request = options(folder, "validation", tasks=edited(folder, change))
    with pytest.raises(RequestError, match=message):
        eutectic.merge(**request, output=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("search", ["divergence", "validation"])
def test_one_row_of_the_test_data_is_enough_to_refuse(tmp_path, folder, search):
    split = "proxy" if search == "divergence" else "validation"
    rows = (folder / f"left.{split}.jsonl").read_text()
    leaked = json.loads((folder / "left.test.jsonl").read_text().splitlines()[5])
    leaked["text"] = f" {leaked['text'].upper()}  "  # the same row for who reads it
    (folder / "leak.jsonl").write_text(rows + json.dumps(leaked) + "\n")
    tasks = edited(folder, lambda t: t["left"]["data"].update({split: "leak.jsonl"}))
    request = options(folder, search, tasks=tasks)
    with pytest.raises(RequestError, match=f"{split} and test share 1 of 24"):
        eutectic.tune(**request, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_experts_without_a_task_are_named(folder):
    request = options(folder, "divergence", tasks=edited(folder, lambda t: t.pop("right")))
    report = eutectic.tune(**request)
    assert "experts without a task were ignored: right" in report.notes[-1]


def test_tune_needs_a_search_and_one_place(tmp_path, folder):
    request = options(folder, "divergence")
    request["scale"] = 0.4
    with pytest.raises(RequestError, match=r"scale is 0\.4, not a search"):
        eutectic.tune(**request)
    search = {"search": "divergence", "tasks": str(folder / "tasks.yaml")}
    with pytest.raises(RequestError, match="work and output exclude each other"):
        eutectic.tune(**request, search=search, work=tmp_path / "w", output=tmp_path / "o")


def test_tune_writes_the_model(tmp_path, folder):
    request = options(folder, "divergence")
    report = eutectic.tune(**request, output=tmp_path / "out")
    assert report.output is not None and report.output.scale == report.scale
    found = written(folder, tmp_path / "out", "proxy")
    assert all(torch.isfinite(merged).all() for _, _, merged in found.values())
