"""What a search reads besides weights: the expert's classes, a tokenizer, who has a pooler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import eutectic
from eutectic.errors import CheckpointError, RequestError

pytest.importorskip("transformers")
from evaluation import world  # noqa: E402 - after the check that transformers is there

LABELS = ("no", "maybe", "yes")
OTHER = ("yes", "no", "maybe")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base with a head of its own, an expert, and texts."""
    world.save(world.make("bert", labels=LABELS, seed=5), tmp_path / "base")
    world.save(world.make("bert", labels=LABELS, seed=7), tmp_path / "a")
    texts = world.sentences(60)
    data = {}
    for i, split in enumerate(("proxy", "validation")):
        chosen = texts[30 * i : 30 * i + 30]
        rows = [{"text": t, "label": LABELS[n % 3]} for n, t in enumerate(chosen)]
        data[split] = world.jsonl(tmp_path / f"{split}.jsonl", rows).name
    world.tasks(tmp_path / "t.yaml", a={"kind": "text-classification", "data": data})
    return tmp_path


def tune(folder: Path, search: str = "validation", tasks: str = "t.yaml", **more):
    scale = {"search": search, "tasks": str(folder / tasks), "points": 3, "tolerance": 0.5}
    experts = {"a": folder / "a"}
    return eutectic.tune(
        base=folder / "base", experts=experts, method="average", scale=scale, **more
    )


def figures(folder: Path, **more):
    found = eutectic.evaluate(
        folder / "t.yaml", base=folder / "base", experts={"a": folder / "a"},
        split="validation", resamples=0, **more,
    )  # fmt: skip
    return {r.checkpoint: r.value for r in found.results}


def _reorder(config: Path) -> None:
    values = json.loads(config.read_text())
    values["label2id"] = {name: i for i, name in enumerate(OTHER)}
    config.write_text(json.dumps(values))


def test_classes_in_two_orders_are_not_merged_unasked(folder: Path):
    plain = tune(folder).search
    assert plain["experts"]["a"] == figures(folder)["a"]
    _reorder(folder / "base" / "config.json")
    message = (
        "the base has a head with the classes yes, no, maybe,\nand expert 'a' one with no, may"
    )
    for search in ("validation", "divergence"):
        with pytest.raises(RequestError, match=message):
            tune(folder, search)
    task = {"kind": "text-classification", "labels": list(LABELS)}
    data = {s: f"{s}.jsonl" for s in ("proxy", "validation")}
    world.tasks(folder / "named.yaml", a={**task, "data": data})
    assert tune(folder, tasks="named.yaml").search["points"] == plain["points"]
    world.tasks(folder / "wrong.yaml", a={**task, "labels": list(OTHER), "data": data})
    assert tune(folder, tasks="wrong.yaml").search["points"] != plain["points"]


def test_a_head_that_the_recipe_keeps_is_the_experts(folder: Path, tmp_path: Path):
    _reorder(folder / "base" / "config.json")
    rules = ({"match": "classifier.*", "treatment": "head"},)
    report = tune(folder, tensors=rules, output=tmp_path / "out")
    best = next(p for p in report.search["points"] if p["scale"] == report.scale)
    assert best["parts"]["a"] == figures(folder, models={"m": tmp_path / "out"})["m"]
    values = [p["value"] for p in report.search["points"]]
    assert len(set(values)) > 1


@pytest.mark.parametrize("search", ["validation", "divergence"])
def test_without_a_tokenizer_of_the_base_the_experts_encodes(folder: Path, search: str):
    with_it = tune(folder, search).search["points"]
    for file in (folder / "base").glob("*token*"):
        file.unlink()
    assert tune(folder, search).search["points"] == with_it
    for file in (folder / "a").glob("*token*"):
        file.unlink()
    with pytest.raises(RequestError, match="neither it, nor the expert, nor the base has a token"):
        tune(folder, search)


def test_what_was_measured_is_kept_only_while_its_tokenizer_is(folder: Path, tmp_path: Path):
    first = tune(folder, work=tmp_path / "work").search
    assert tune(folder, work=tmp_path / "work").search == first
    file = folder / "base" / "tokenizer.json"
    values = json.loads(file.read_text())
    numbers = values["model"]["vocab"]
    words = [word for word in numbers if word.startswith("w")]
    numbers.update(zip(words, [numbers[word] for word in reversed(words)], strict=True))
    file.write_text(json.dumps(values))
    again = tune(folder, work=tmp_path / "work").search
    assert again["points"] == tune(folder).search["points"] != first["points"]


@pytest.mark.parametrize("order", [("mean", "pooler"), ("pooler", "mean")])
def test_a_missing_pooler_is_missed_whatever_runs_before(tmp_path: Path, order: tuple[str, str]):
    base = world.save(world.make("encoder"), tmp_path / "base")
    for i, name in enumerate("ab", 1):
        world.save(world.make("encoder", seed=i), tmp_path / name)
    state = load_file(base / "model.safetensors")
    save_file({"weight": torch.ones(3, 16)}, tmp_path / "h.safetensors")
    kept = {k: v for k, v in state.items() if "pooler" not in k}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    tasks = {}
    for name, pooling in zip("ab", order, strict=True):
        world.jsonl(tmp_path / f"{name}.jsonl", [{"text": t} for t in world.sentences(6)])
        spec = {"kind": "text-classification", "labels": list(LABELS), "head": "h.safetensors"}
        tasks[name] = {**spec, "data": {"proxy": f"{name}.jsonl"}, "pooling": pooling}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    scale = {"search": "divergence", "tasks": str(tmp_path / "t.yaml"), "points": 3}
    experts = {name: tmp_path / name for name in "ab"}
    with pytest.raises(CheckpointError, match=r"base: task '.' .*needs tensors .*pooler"):
        eutectic.tune(base=base, experts=experts, method="average", scale=scale)


def test_an_expert_without_a_figure_is_null_in_the_record(folder: Path):
    numbers = [
        {"text": t, "label": 1.0} for t in world.sentences(5)
    ]  # a constant correlates with nothing
    world.jsonl(folder / "n.jsonl", numbers)
    for name in ("base", "a"):
        world.save(world.make("bert", labels=("score",), seed=len(name)), folder / name)
    world.tasks(folder / "t.yaml", a={"kind": "regression", "data": {"validation": "n.jsonl"}})
    search = tune(folder).search
    assert search["experts"] == {"a": None}
    json.dumps(search, allow_nan=False)


@pytest.mark.parametrize("heads", ["per_expert", "base", "drop"])
def test_what_is_written_is_what_was_measured_whatever_becomes_of_the_heads(
    folder: Path, tmp_path: Path, heads: str
):
    rules = ({"match": "classifier.*", "treatment": "head"},)
    report = tune(folder, tensors=rules, heads=heads, output=tmp_path / "out")
    best = next(p for p in report.search["points"] if p["scale"] == report.scale)
    assert best["parts"]["a"] == figures(folder, models={"m": tmp_path / "out"})["m"]


def test_labels_of_proxy_data_are_not_read(folder: Path):
    plain = tune(folder, "divergence").search["points"]
    rows = [json.loads(line) for line in (folder / "proxy.jsonl").read_text().splitlines()]
    world.jsonl(folder / "proxy.jsonl", [row | {"label": -1} for row in rows])
    assert tune(folder, "divergence").search["points"] == plain


def test_rows_that_other_tasks_test_are_told(folder: Path):
    data = {"proxy": "proxy.jsonl", "validation": "validation.jsonl"}
    rows = (folder / "validation.jsonl").read_text().splitlines(keepends=True)
    (folder / "test.jsonl").write_text("".join(rows[:7]))
    spec = {"kind": "text-classification", "expert": "a"}
    world.tasks(
        folder / "two.yaml",
        a=spec | {"data": data},
        other=spec | {"data": {"test": "test.jsonl", "validation": "proxy.jsonl"}},
    )
    report = tune(folder, tasks="two.yaml")
    assert report.search["tasks"]["a"]["test_rows_of_other_tasks"] == {"other": 7}
    assert report.search["tasks"]["other"]["test_rows_of_other_tasks"] == {}
    assert any("7 rows of a are test rows of other" in note for note in report.notes)


def test_another_search_leaves_out_what_it_does_not_take(folder: Path):
    scale = {
        "search": "divergence", "tasks": str(folder / "t.yaml"), "compare": "features",
        "points": 3, "tolerance": 0.5,
    }  # fmt: skip
    asked = {"base": folder / "base", "experts": {"a": folder / "a"}, "method": "average"}
    found = eutectic.tune(asked | {"scale": scale}, search={"search": "validation"})
    assert found.search["search"] == "validation" and len(found.search["points"]) >= 3
    with pytest.raises(RequestError, match="statistics of every expert"):  # not: takes no tasks
        eutectic.tune(asked | {"scale": scale}, search={"search": "gram"})
