"""Every sentence is changed, and nothing but the sentences changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eutectic import sentences
from eutectic.errors import Fault, Note, RecipeError
from eutectic.execution.journal import Journal
from eutectic.execution.run import merge
from eutectic.execution.schedule import Choice
from eutectic.recipes.load import load_recipe
from helpers.folders import digests, make_base, make_expert, save

Eutectic = Callable[..., Any]
TEXTS = {"notes", "reason", "why"}  # what holds sentences in documents
NOTED = {
    "mixed_classes", "extra_prefix", "copied", "expert_lacks", "heads_kept", "idle_rules",
    "rules_of_tied", "own_fallback", "statistics_needed",
}  # fmt: skip
REASONS = {
    "matrix", "small", "integers", "table", "rule", "tied", "other_shape", "in_no_expert",
    "no_statistics",
}  # fmt: skip
FAULTY = """
method: iso_c
method: ties
parameters: {density: 3, wrong: 1}
experts: {a: ./nowhere, b: ./b}
scale: x
unknown: 1
"""


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what `plan` and `merge` need of models about which there is much to say."""
    monkeypatch.chdir(tmp_path)
    base = make_base()
    base["lm_head.weight"] = base["embed_tokens.weight"].clone()
    base["classifier.out.weight"] = torch.ones(3, 16)
    base |= {name: torch.ones(4, 4) for name in ("pooler.weight", "rare.weight", "lone.weight")}
    save(tmp_path / "base", base, {"id2label": {0: "x", 1: "y", 2: "z"}})
    for seed, name in enumerate("ab", 1):
        tensors = make_expert(base, seed)
        del tensors["lm_head.weight"], tensors["lone.weight"]
        tensors["pooler.weight"] = torch.ones(2 + seed, 4)
        tensors["score.weight"] = torch.ones(2, 16)
        if name == "b":
            del tensors["rare.weight"]
            tensors = {f"model.{key}": value for key, value in tensors.items()}
        save(tmp_path / name, tensors, {"id2label": {0: name, 1: "y", 2: "z"}})
    rules = [
        "{match: nothing*, treatment: copy}",
        "{match: lm_*, scale: 0.5}",
        "{match: layers.1.proj.bias, treatment: vector}",
    ]
    stated = [
        "--memory",
        "4GB",
        "--fallback",
        "allow",
        "--set",
        f"tensors=[{', '.join(rules)}]",
        "--set",
        "missing=base",
    ]
    return ["--base", "base", "-m", "regmean", "a=a", "b=b", *stated]


@pytest.fixture
def reworded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what changes every sentence."""

    def change() -> None:
        monkeypatch.setattr(sentences, "SENTENCES", dict.fromkeys(sentences.SENTENCES, "x"))
        monkeypatch.setattr(Fault, "__str__", lambda self: "x")

    return change


def without_texts(value: Any) -> Any:
    """Return a document whose sentences are counted only."""
    if isinstance(value, dict):
        return {
            key: (len(inner) if isinstance(inner, list) else None)
            if key in TEXTS
            else without_texts(inner)
            for key, inner in value.items()
        }
    return [without_texts(inner) for inner in value] if isinstance(value, list) else value


def observed(eutectic: Eutectic, arguments: list[str], output: str) -> dict[str, Any]:
    """Return what a plan and a merge do and show, besides sentences and times."""
    planned = eutectic("plan", "--json", *arguments)
    table = eutectic("plan", *arguments, "-m", "iso_c")
    merged = eutectic("merge", "-o", output, *arguments)
    assert (planned.exit_code, table.exit_code, merged.exit_code) == (0, 0, 0), merged.output
    files = digests(Path(output))
    del files["README.md"], files["eutectic.json"]
    return {
        "plan": without_texts(json.loads(planned.stdout)),
        "rows": [line.split() for line in table.stdout.split("note")[0].splitlines()],
        "warnings": [answer.stderr.count("warning:") for answer in (planned, table, merged)],
        "files": files,
        "provenance": without_texts(json.loads(Path(output, "eutectic.json").read_text())),
    }


def test_a_plan_and_a_merge(
    eutectic: Eutectic, arguments: list[str], reworded: Callable[[], None]
) -> None:
    before = observed(eutectic, arguments, "first")
    assert {note["kind"] for note in before["plan"]["note_records"]} >= NOTED
    assert {kind for row in before["plan"]["tensors"] for kind in row["kinds"]} >= REASONS
    assert before["warnings"] == [2, 1, 2]
    reworded()
    assert observed(eutectic, arguments, "second") == before
    texts = json.loads(Path("second/eutectic.json").read_text())["notes"]
    assert set(texts) == {"x", "warning: x"}


def test_the_note_of_a_search_that_was_killed_after_the_move(
    arguments: list[str],
    reworded: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = {"scale": 0.5, "layers": 3, "matrices": 4, "lost_percent": 1.5}
    note = Note("closed_form_scale", numbers=numbers)
    experts = {"a": "a", "b": "b"}
    request = {"base": "base", "experts": experts, "missing": "base", "scale": "auto"}
    request |= {"method": "task_arithmetic", "output": tmp_path / "out"}
    reworded()

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(**request, choose=lambda *_: lambda _: Choice(0.5, note, {}))
    report = merge(**request, choose=lambda *_: lambda _: Choice(0.1, Note("matrix"), {}))
    assert (report.scale, report.note_records[-1]) == (0.5, note)


def test_faults_keep_their_order_and_the_exit_code(
    eutectic: Eutectic, tmp_path: Path, reworded: Callable[[], None]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(FAULTY)

    def answers() -> list[Any]:
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        return [eutectic("plan", path).exit_code, *((f.kind, f.line) for f in caught.value.faults)]

    before = answers()
    assert before == [
        2, ("missing_key", 0), ("repeated_key", 3), ("less_than_equal", 4),
        ("unknown_parameter", 4), ("no_file", 5), ("no_file", 5), ("value_error", 6),
        ("unknown_key", 7),
    ]  # fmt: skip
    reworded()
    assert answers() == before
