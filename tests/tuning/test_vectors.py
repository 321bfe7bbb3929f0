"""Merges of (IA)³ adapters are searched over data: what runs at α is what peft runs of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from eutectic.tuning import kl_divergence
from evaluation import world
from helpers.cli import invoke

pytestmark = pytest.mark.filterwarnings("ignore")
peft = pytest.importorskip("peft")

LABELS = ("no", "maybe", "yes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A classifier, and two adapters that bring vectors and heads of its shape."""
    folder = tmp_path_factory.mktemp("vectors")
    world.save(world.make("bert"), folder / "base")
    for seed, name in enumerate("ab", 1):
        config = peft.IA3Config(
            task_type="SEQ_CLS", target_modules=["key", "output.dense"],
            feedforward_modules=["output.dense"],
        )  # fmt: skip
        adapted = peft.get_peft_model(world.make("bert"), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "ia3_l" in key or "modules_to_save" in key:
                    parameter.add_(0.5 * torch.randn_like(parameter))
        adapted.save_pretrained(folder / name)
        rows = [{"text": text} for text in world.sentences(8, seed)]
        world.jsonl(folder / f"{name}.proxy.jsonl", rows)
        rows = [
            {"text": text, "label": LABELS[i % 3]}
            for i, text in enumerate(world.sentences(9, 10 + seed))
        ]
        world.jsonl(folder / f"{name}.validation.jsonl", rows)
    tasks = {
        name: {
            "kind": "text-classification",
            "data": {split: f"{name}.{split}.jsonl" for split in ("proxy", "validation")},
        }
        for name in "ab"
    }
    world.tasks(folder / "tasks.yaml", **tasks)
    return folder


def logits(base: Path, adapter: Path, texts: list[str]) -> torch.Tensor:
    """Return what peft's model says, one text at a time."""
    model = peft.PeftModel.from_pretrained(world.make("bert"), str(adapter)).eval()
    words = world.tokenizer()
    with torch.no_grad():
        given = [words(text, return_tensors="pt") for text in texts]
        return torch.cat([model(input_ids=g["input_ids"]).logits for g in given])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_every_point_of_the_curve_is_the_merge_at_its_scale(
    folder: Path, tmp_path: Path, dtype: str | None
) -> None:
    options: dict[str, Any] = {
        "base": folder / "base", "experts": {n: folder / n for n in "ab"},
        "method": "task_arithmetic", "dtype": dtype,
    }  # fmt: skip
    search = {"tasks": folder / "tasks.yaml", "points": 3, "tolerance": 0.9, "range": [0.2, 1.5]}
    found = eutectic.tune(search={"search": "divergence", **search}, **options)
    values = set()
    for number, point in enumerate(found.search["points"][:2]):
        merged = tmp_path / str(number)
        eutectic.merge(output=merged, scale=point["scale"], **options)
        for name in "ab":
            texts = world.sentences(8, 1 + "ab".index(name))
            expert = logits(folder / "base", folder / name, texts)
            expected = kl_divergence(expert, logits(folder / "base", merged, texts))
            assert point["parts"][name] == pytest.approx(expected, rel=1e-4)
            values.add(expected)
    assert len(values) == 4 and max(values) > 0.01  # vectors and heads matter


def test_labels_choose_too_and_the_model_is_written(folder: Path, tmp_path: Path) -> None:
    words = ["tune", "--base", folder / "base", f"a={folder / 'a'}", f"b={folder / 'b'}"]
    words += ["-m", "average", "--search", "validation", "--tasks", folder / "tasks.yaml"]
    words += ["--points", 3, "--tolerance", 0.9, "-o", tmp_path / "out", "--json"]
    told = invoke(*words)
    assert told.code == 0, told.err
    record = json.loads(told.out)
    made = json.loads((tmp_path / "out" / "eutectic.json").read_text())
    assert made["scale"] == record["scale"]
    results = eutectic.evaluate(
        folder / "tasks.yaml", base=folder / "base", models={"m": tmp_path / "out"},
        split="validation", resamples=0,
    )  # fmt: skip
    best = next(p for p in record["points"] if p["scale"] == record["scale"])
    measured = {r.task: r.value for r in results.results if r.checkpoint == "m"}
    assert best["parts"] == pytest.approx(measured)


def test_alpha_is_searched_for_every_mixture_of_a_sweep(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {folder / 'base'}\nexperts: {{a: {folder / 'a'}, b: {folder / 'b'}}}\n"
        f"method: task_arithmetic\nscale: {{search: divergence, tasks: {folder / 'tasks.yaml'}, "
        "points: 3, tolerance: 0.9}\n"
    )
    words = ["merge", recipe, "-o", tmp_path / "mixed", "--sweep", "0.25,1"]
    told = invoke(*words)
    assert told.code == 0, told.err
    assert told.out.count("α = ") == 2
    for name in ("0.25", "1"):
        made = json.loads((tmp_path / "mixed" / name / "eutectic.json").read_text())
        assert made["scale"] == made["search"]["scale"]
    assert invoke(*words).out.count("was finished") == 2
    compared = eutectic.compare(
        base=folder / "base", experts={n: folder / n for n in "ab"}, methods=["average"],
        searches=["divergence"], search={"points": 3, "tolerance": 0.9}, split="validation",
        tasks=folder / "tasks.yaml", models={"mixed": tmp_path / "mixed"}, resamples=10,
        output=tmp_path / "compared",
    )  # fmt: skip
    names = {row.name for row in compared.rows}
    assert names == {"average@divergence", "mixed/0.25", "mixed/1"}
