"""Whole searches for tasks of every kind and data in every format, held to `evaluate`."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from eutectic.errors import RequestError

pytest.importorskip("transformers")
from evaluation import world  # noqa: E402 - after the check that transformers is there

LABELS = ("no", "maybe", "yes")
ROWS = 24
NAMES = ("a", "b")
# kind of the task -> (model, its classes, ending of the data)
KINDS: Mapping[str, tuple[str, Sequence[str], str]] = {
    "text-classification": ("bert", LABELS, "jsonl"),
    "pair-classification": ("bert", LABELS, "tsv"),
    "regression": ("bert", ("score",), "csv"),
    "image-classification": ("vit", LABELS, ""),
    "sequence-to-sequence": ("t5", LABELS, "parquet"),
    "language-model": ("gpt2", LABELS, "csv"),
}


def _rows(kind: str, seed: int, expert: Any) -> list[dict[str, Any]]:
    """Return rows whose answers are the expert's own."""
    texts, others = world.sentences(ROWS, seed), world.sentences(ROWS, seed + 100)
    words = world.tokenizer()
    if kind == "language-model":
        return [{"text": t} for t in texts]
    found: list[dict[str, Any]] = []
    for text, other in zip(texts, others, strict=True):
        pair = {"text_pair": other} if kind == "pair-classification" else {}
        encoded = words(text, *pair.values(), return_tensors="pt", truncation=True, max_length=24)
        encoded.pop("token_type_ids", None)
        if kind == "sequence-to-sequence":
            made = expert.generate(**encoded, max_new_tokens=4, do_sample=False)
            answer = words.decode(made[0], skip_special_tokens=True)
            found.append({"source": text, "target": answer})
            continue
        logits = expert(**encoded).logits[0]
        label = float(logits[0]) if kind == "regression" else LABELS[int(logits.argmax())]
        found.append({"text": text, **pair, "label": label})
    return found


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
        parquet.write_table(table, path)
    elif path.suffix == ".jsonl":
        world.jsonl(path, rows)
    else:
        with path.open("w", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)


def _family(folder: Path, kind: str) -> Path:
    """Write a base, two experts that differ from it a little, and their tasks."""
    model, labels, ending = KINDS[kind]
    base = world.make(model, labels)
    world.save(base, folder / "base")
    tasks = {}
    for number, name in enumerate(NAMES, 1):
        expert = world.make(model, labels)
        torch.manual_seed(number)
        with torch.no_grad():
            for values in expert.parameters():
                values.add_(0.1 * torch.randn_like(values))
        world.save(expert, folder / name)
        data = {}
        for shift, split in enumerate(("proxy", "validation")):
            path = folder / (f"{name}-{split}" + (f".{ending}" if ending else ""))
            seed = 10 * number + shift
            if ending:
                with torch.inference_mode():
                    _write(path, _rows(kind, seed, expert))
            else:
                world.images(path, ROWS // 2, seed=seed)
            data[split] = path.name
        tasks[name] = {"kind": kind, "data": data}
    world.tasks(folder / "tasks.yaml", **tasks)
    return folder


def _figures(folder: Path, split: str, output: Path) -> dict[tuple[str, str], Any]:
    found = eutectic.evaluate(
        folder / "tasks.yaml", experts={n: folder / n for n in NAMES}, models={"m": output},
        split=split, resamples=0,
    )  # fmt: skip
    return {(r.checkpoint, r.task): r for r in found.results}


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_scale_scores_as_evaluate_says(tmp_path: Path, kind: str):
    folder = _family(tmp_path, kind)
    report = eutectic.tune(
        base=folder / "base",
        experts={n: folder / n for n in NAMES},
        method="task_arithmetic",
        search={
            "search": "validation", "tasks": folder / "tasks.yaml", "range": [0.3, 1.2],
            "points": 3, "tolerance": 0.5,
        },
        output=folder / "out",
    )  # fmt: skip
    found = _figures(folder, "validation", folder / "out")
    best = next(p for p in report.search["points"] if p["scale"] == report.scale)
    for name in NAMES:
        expected = found["m", name]
        assert best["parts"][name] == pytest.approx(expected.value, rel=1e-6), json.dumps(best)
        assert report.search["experts"][name] == found[name, name].value
    values = [p["value"] for p in report.search["points"]]
    assert best["value"] == max(values) and len(set(values)) > 1
    if all(found["m", n].normalized for n in NAMES):
        mean = sum(found["m", n].normalized for n in NAMES) / len(NAMES)
        assert best["value"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_expert_itself_diverges_by_nothing(tmp_path: Path, kind: str):
    folder = _family(tmp_path, kind)
    tasks = world.tasks(
        folder / "one.yaml", a={"kind": kind, "data": {"proxy": _proxy(folder, kind)}}
    )
    report = eutectic.tune(
        base=folder / "base",
        experts={"a": folder / "a"},
        method="task_arithmetic",
        search={
            "search": "divergence", "tasks": tasks, "range": [0.25, 4.0],
            "points": 3, "tolerance": 0.6,
        },
    )  # fmt: skip
    assert report.scale == 1  # the middle of the grid: Δ is the expert's own
    values = {p["scale"]: p["value"] for p in report.search["points"]}
    assert values[1.0] == pytest.approx(0, abs=1e-6) and min(values[0.25], values[4.0]) > 1e-3


def test_texts_without_a_predicted_token_are_refused(tmp_path: Path):
    folder = _family(tmp_path, "language-model")
    for name in ("base", *NAMES):
        world.tokenizer(end="").save_pretrained(folder / name)
    world.jsonl(folder / "p.jsonl", [{"text": "w1"}, {"text": "w2"}])
    spec = {"kind": "language-model", "data": {"proxy": "p.jsonl"}}
    search = {"search": "divergence", "tasks": world.tasks(folder / "one.yaml", a=spec)}
    with pytest.raises(RequestError, match="none of the 2 texts has a token that is predicted"):
        eutectic.tune(
            base=folder / "base", experts={"a": folder / "a"}, method="task_arithmetic",
            search=search,
        )  # fmt: skip


def _proxy(folder: Path, kind: str) -> str:
    return next(p.name for p in folder.glob("a-proxy*"))
