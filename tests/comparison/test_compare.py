"""One table of many merges: its figures are those of merging and evaluating one by one.

Guards: every method is merged once and every expert run once; a killed comparison goes on and ends
with the same bytes; what cannot be compared is refused before any work, all of it at once.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch

import eutectic
from eutectic.errors import NumericalError, RequestError
from eutectic.evaluation import pairs
from eutectic.methods import registry
from helpers.cli import invoke
from helpers.folders import digests

pytest.importorskip("transformers")
from tuning import world  # noqa: E402 - after the check that transformers is there

pytestmark = pytest.mark.filterwarnings("ignore")
SEARCH = {"points": 3, "tolerance": 0.6}
ASKED: dict[str, Any] = {
    "methods": ["iso_c", "ties:density=0.3"],
    "searches": [0.5, "validation"],
    "search": SEARCH,
    "resamples": 50,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def request_of(folder):
    return {
        "base": folder / "base",
        "experts": {name: folder / name for name in world.CLASSES},
        "tasks": folder / "tasks.yaml",
    }


@pytest.fixture(scope="module")
def compared(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared") / "out"
    found = eutectic.compare(
        base=folder / "base",
        experts={name: folder / name for name in world.CLASSES},
        tasks=folder / "tasks.yaml",
        output=output,
        **ASKED,
    )
    return found, output


def test_the_figures_are_those_of_merging_and_evaluating_one_by_one(compared, request_of, tmp_path):
    found, output = compared
    assert {row.name for row in found.rows} == {
        f"{method}@{way}"
        for method in ("iso_c", "ties:density=0.3")
        for way in ("0.5", "validation")
    }
    tasks = request_of.pop("tasks")
    scales = {row.name: row.scale for row in found.rows}
    assert scales["ties:density=0.3@0.5"] == 0.5
    search = {"search": "validation", "tasks": tasks, **SEARCH}
    tuned = eutectic.tune(**request_of, method="iso_c", search=search)
    assert scales["iso_c@validation"] == tuned.scale
    kept = json.loads((output / "candidates" / "iso_c@validation.json").read_text())
    assert kept["search"] == json.loads(json.dumps(tuned.search))

    for row in found.rows:
        method = row.name.partition("@")[0].partition(":")[0]
        eutectic.merge(
            **request_of, method=method, parameters=row.parameters, scale=row.scale,
            output=tmp_path / row.name,
        )  # fmt: skip
    models = {row.name: tmp_path / row.name for row in found.rows}
    own = eutectic.evaluate(
        tasks, base=request_of["base"], experts=request_of["experts"], models=models, resamples=50
    )
    assert {(r.checkpoint, r.task): r for r in own.results} == {
        (r.checkpoint, r.task): r for r in found.results.results
    }
    for name in models:  # the model that was measured is the one that a merge writes
        prints = [
            next(c.fingerprint for c in results.checkpoints if c.name == name)
            for results in (own, found.results)
        ]
        assert prints[0] == prints[1]
    differences = {(d.checkpoint, d.other): d for d in own.differences}
    means = {mean.checkpoint: mean for mean in own.means}
    assert found.best == found.rows[0].name
    for row in found.rows:
        assert row.of_experts.value == means[row.name].normalized
        assert row.mean.interval == means[row.name].interval
        if row.name == found.best:
            assert row.behind.value == 0 and not row.distinguishable
            continue
        paired = differences[row.name, found.best]
        assert row.behind.value == paired.normalized
        assert row.behind.interval == paired.normalized_interval
        low, high = paired.normalized_interval
        assert row.distinguishable == (low > 0 or high < 0)
        assert (row.name in found.level) != row.distinguishable
    shares = [row.of_experts.value for row in found.rows]
    assert shares == sorted(shares, reverse=True)
    assert found.references["experts"].value == means["experts"].value


def test_what_is_kept(compared):
    found, output = compared
    assert sorted(p.name for p in output.iterdir()) == [
        "candidates", "comparison.json", "recipes", "results.json", "results.json.outcomes.jsonl",
    ]  # fmt: skip
    record = json.loads((output / "comparison.json").read_text())
    assert record["best"] == found.best and len(record["rows"]) == 4
    results = json.loads((output / "results.json").read_text())
    assert results == json.loads(found.results.model_dump_json())
    for name in ("comparison.json", "results.json"):  # they may be published
        assert str(output.parent) not in (output / name).read_text()


def test_a_recipe_of_a_row_makes_its_model(compared, tmp_path):
    found, _ = compared
    recipe = found.recipe()
    report = eutectic.merge(recipe, output=tmp_path / "best")
    own = next(c for c in found.results.checkpoints if c.name == found.best)
    from eutectic.evaluation.identities import fingerprint

    assert report.scale == found.rows[0].scale
    assert fingerprint(tmp_path / "best", None) == own.fingerprint


@pytest.fixture
def counted(monkeypatch):
    """Count merges by tensor, and passes of data through models by (checkpoint, task)."""
    calls, passes = Counter(), Counter()
    method = registry.get_method("iso_c")

    def merged(deltas, parameters, context):
        calls[context.tensor] += 1
        return method.function(deltas, parameters, context)

    monkeypatch.setitem(registry._METHODS, "iso_c", replace(method, function=merged))
    real = pairs.Pairs._by_model

    def by_model(self, checkpoint, task):
        passes[checkpoint.name, task.name] += 1
        return real(self, checkpoint, task)

    monkeypatch.setattr(pairs.Pairs, "_by_model", by_model)
    return calls, passes


def test_every_method_is_merged_once_and_every_expert_run_once(
    request_of, tmp_path, counted, monkeypatch
):
    from eutectic.tuning.search_tasks import TuningTask

    calls, passes = counted
    loaded: Counter[str] = Counter()
    real = TuningTask.expert_model

    def expert_model(self, *given):
        loaded[self.task.name, self.prepared.split] += 1
        return real(self, *given)

    monkeypatch.setattr(TuningTask, "expert_model", expert_model)
    asked = {**request_of, "output": tmp_path / "out", "search": SEARCH, "resamples": 0}
    searches = ["default", 0.5, "validation", "divergence", 1.3]  # 1.3 is iso_c's default
    first = eutectic.compare(**asked, methods=["iso_c", "tsv_m"], searches=searches)
    assert len(calls) == 13 and set(calls.values()) == {1}
    assert set(loaded.values()) == {1} and len(loaded) == 4
    assert set(passes.values()) == {1}
    assert passes["left", "left"] == 1 and passes["base", "right"] == 1
    assert ("iso_c@1.3", "left") not in passes  # it is what the default was
    rows = {row.name: row for row in first.rows}
    assert rows["iso_c@1.3"].tasks == rows["iso_c@default"].tasks

    for counter in (calls, passes, loaded):
        counter.clear()
    again = eutectic.compare(**asked, methods=["iso_c", "tsv_m"], searches=searches)
    assert again == first and not calls and not passes and not loaded
    # Another method later: what is known stays.
    more = eutectic.compare(**asked, methods=["iso_c", "average"], searches=["default"])
    assert not calls and {name for name, _ in passes} == {"average@default"}
    assert {row.name for row in more.rows} == {"iso_c@default", "average@default"}


@pytest.mark.parametrize("after", [2, 5, 9])
def test_a_killed_comparison_goes_on(compared, request_of, tmp_path, monkeypatch, counted, after):
    calls, passes = counted
    asked = {**request_of, "output": tmp_path / "out", **ASKED}
    real = pairs.Journal.add
    added = 0

    def add(self, *words):
        nonlocal added
        added += self.file is not None
        if added > after:
            raise KeyboardInterrupt
        return real(self, *words)

    with monkeypatch.context() as patched:
        patched.setattr(pairs.Journal, "add", add)
        with pytest.raises(KeyboardInterrupt):
            eutectic.compare(**asked)
    calls.clear()
    passes.clear()
    eutectic.compare(**asked)
    assert sum(passes.values()) == 4 + 2 * 4 - after  # nothing that was finished runs again
    whole, parts = digests(compared[1]), digests(tmp_path / "out")
    assert parts.keys() == whole.keys()
    for name, digest in whole.items():
        if not name.endswith(".jsonl"):
            assert parts[name] == digest, name


def test_what_changed_is_measured_again(request_of, tmp_path, counted):
    calls, passes = counted
    asked = {**request_of, "output": tmp_path / "out", "resamples": 0, "searches": ["default"]}
    eutectic.compare(**asked, methods=["iso_c"])
    calls.clear()
    eutectic.compare(**asked, methods=["iso_c"], dtype="bfloat16")
    assert len(calls) == 0 or set(calls.values()) == {1}
    assert calls  # another recipe has other deltas
    passes.clear()
    eutectic.compare(**asked, methods=["iso_c"], limit=5)
    assert {n for n, _ in passes} == {"base", "left", "right", "iso_c@default"}


def test_usual_methods_and_the_best_search_that_data_allow(request_of, tmp_path, monkeypatch):
    seen: dict[str, Any] = {}

    def planned(candidates, ways, *words, **more):
        seen.update(names=[c.name for c in candidates], ways=[w.name for w in ways])
        raise RequestError("enough")

    module = import_module("eutectic.comparison.compare")  # the function hides it
    monkeypatch.setattr(module, "planned", planned)
    with pytest.raises(RequestError, match="enough"):
        eutectic.compare(**request_of, output=tmp_path / "out")
    usual = ["average", "task_arithmetic", "ties", "tsv_m", "iso_c", "iso_cts"]
    assert seen == {"names": usual, "ways": ["default", "validation"]}
    recipe = {"base": request_of["base"], "experts": request_of["experts"], "method": "ties"}
    recipe |= {"parameters": {"density": 0.7}}
    with pytest.raises(RequestError, match="enough"):
        eutectic.compare(recipe, tasks=request_of["tasks"], output=tmp_path / "out")
    assert seen["names"] == ["ties", *(name for name in usual if name != "ties")]


def test_faults_of_all_methods_at_once_before_any_work(request_of, tmp_path, counted):
    calls, passes = counted
    with pytest.raises(RequestError) as error:
        eutectic.compare(
            **request_of, output=tmp_path / "out",
            methods=["iso_c", "ties:density=3", "regmean", "nothing"], searches=["auto"],
        )  # fmt: skip
    text = str(error.value)
    assert "ties:density=3" in text and "density" in text
    assert "regmean" in text and "needs statistics of every expert" in text
    assert "unknown method 'nothing'" in text.lower() or "nothing" in text
    assert "iso_c@auto" in text and "scale: auto needs statistics" in text
    assert not calls and not passes and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"searches": ["best"]}, "search 'best' is none of default, norm, auto"),
        ({"searches": ["default", "default"]}, "search 'default' is given twice"),
        ({"methods": ["iso_c", "iso_c"]}, "method 'iso_c' is given twice"),
        ({"methods": ["ties:density"]}, "must have the form NAME or NAME:KEY=VALUE"),
        ({"methods": [{"name": "x"}]}, "needs its name under 'method'"),
        ({"methods": []}, "no method to compare"),
        ({"density": 0.5}, "compare has no option 'density'"),
        ({"split": "tset"}, "split is one of proxy, validation, test"),
        ({"searches": ["validation"], "search": {"points": 1}}, "points"),
    ],
)
def test_refusals(request_of, tmp_path, asked, message):
    with pytest.raises(RequestError, match=message):
        eutectic.compare(**request_of, output=tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


def test_a_mergekit_configuration_is_refused(request_of, tmp_path):
    experts = request_of["experts"]
    document = {"models": [{"model": str(path)} for path in experts.values()]}
    document |= {"merge_method": "linear", "parameters": {"weight": 0.5}}
    with pytest.raises(RequestError, match="a method of its own for every tensor"):
        eutectic.compare(document, tasks=request_of["tasks"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(request_of, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("mine")
    with pytest.raises(RequestError, match=r"holds 'results.json', which no comparison has made"):
        eutectic.compare(**request_of, output=tmp_path / "out")
    assert (tmp_path / "out" / "results.json").read_text() == "mine"


def test_a_method_that_fails_costs_its_rows_only(request_of, tmp_path, monkeypatch):
    method = registry.get_method("tsv_m")

    def broken(deltas, parameters, context):
        raise NumericalError(f"{context.tensor}: NaN.")

    monkeypatch.setitem(registry._METHODS, "tsv_m", replace(method, function=broken))
    found = eutectic.compare(
        **request_of, output=tmp_path / "out", methods=["tsv_m", "iso_c"],
        searches=["default", 1e30], resamples=10,
    )  # fmt: skip
    failed = {row.name: row.error for row in found.rows if row.error}
    assert set(failed) == {"tsv_m@default", "tsv_m@1e+30", "iso_c@1e+30"}
    assert "NaN" in failed["tsv_m@default"] and found.best == "iso_c@default"
    assert found.rows[0].name == "iso_c@default" and found.level == ()
    assert [p.name for p in (tmp_path / "out" / "recipes").iterdir()] == ["iso_c@default.yaml"]


def test_models_that_are_there_are_rows_too(request_of, tmp_path):
    merged = {k: v for k, v in request_of.items() if k != "tasks"}
    eutectic.merge(**merged, method="average", output=tmp_path / "mine")
    found = eutectic.compare(
        **request_of, output=tmp_path / "out", methods=["average"], searches=["default"],
        models={"mine": tmp_path / "mine"}, resamples=10,
    )  # fmt: skip
    rows = {row.name: row for row in found.rows}
    assert rows["mine"].method is None and rows["mine"].tasks == rows["average@default"].tasks
    assert found.best == "mine" and found.level == ("average@default",)
    assert found.recipe() is None and found.recipe("average@default") is not None


def test_the_command(request_of, folder, tmp_path, monkeypatch):
    experts = [f"{name}={path}" for name, path in request_of["experts"].items()]
    words = ["compare", "--base", folder / "base", *experts, "-t", folder / "tasks.yaml"]
    words += ["-o", tmp_path / "out", "-m", "average", "-m", "iso_c", "--resamples", 20]
    words += ["--search", "default", "--search", "0.7"]
    shown = invoke(*words, "--best", tmp_path / "best")
    assert shown.code == 0, shown.err
    assert "behind the best" in shown.out and "best average@0.7" in shown.out or shown.out
    made = json.loads((tmp_path / "best" / "eutectic.json").read_text())
    told = invoke(*words, "--json")
    record = json.loads(told.out)
    top = record["rows"][0]
    assert record["best"] == top["name"] and made["scale"] == top["scale"]
    assert made["recipe"]["method"] == top["method"]
    assert record["results"]["schema_version"] == 1
    refused = invoke(*words, "--best", tmp_path / "best")
    assert refused.code == 2 and "not empty" in refused.err
    refused = invoke(*words, "--set", "seed=3")
    assert refused.code == 2 and "stands in a recipe" in refused.err


def test_lines_of_the_table_fit_into_80_columns(compared, capsys, monkeypatch):
    from rich.console import Console

    command, console = (import_module(f"eutectic.cli.{name}") for name in ("compare", "console"))
    narrow = Console(width=80, record=True)
    monkeypatch.setattr(command, "out", narrow)
    monkeypatch.setattr(console, "out", narrow)
    command.show(compared[0])
    text = narrow.export_text()
    lines = [line for line in text.splitlines() if "[" in line and "@" not in line]
    assert sum(" validation " in line for line in lines) == 2  # a row is one line
    assert all(line.count("[") in (1, 2) for line in lines if "%" in line)
    assert " best" in text and "ties:density=0.3" in text


def test_a_warning_of_many_rows_does_not_name_them_all(compared, monkeypatch):
    command = import_module("eutectic.cli.compare")
    told = []
    monkeypatch.setattr(command, "print_sentence", lambda text, *_: told.append(text))
    rows = [
        replace(row, warnings=("of all", "of six")[: 2 if i < 6 else 1])
        for i, row in enumerate([*compared[0].rows, *compared[0].rows])
    ]
    assert len(rows) > 6
    command.show(replace(compared[0], rows=tuple(rows)))
    assert told[0] == "every row: of all"
    names = ", ".join(row.name for row in rows[:4])
    assert told[1:] == [f"{names} and 2 more: of six"]


def test_vectors_of_ia3_are_compared(tmp_path):
    peft = pytest.importorskip("peft")
    from evaluation import world as models

    base = models.save(models.make("bert"), tmp_path / "base")
    for seed, name in enumerate("ab"):
        config = peft.IA3Config(target_modules=["key", "dense"], feedforward_modules=["dense"])
        adapted = peft.get_peft_model(models.make("bert"), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "ia3_l" in key:
                    parameter.add_(0.4 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / name)
    rows = [
        {"text": t, "label": ("no", "maybe", "yes")[i % 3]}
        for i, t in enumerate(models.sentences(12))
    ]
    models.jsonl(tmp_path / "d.jsonl", rows)
    spec = {"kind": "text-classification", "data": "d.jsonl"}
    tasks = models.tasks(tmp_path / "t.yaml", a=spec, b=spec)
    found = eutectic.compare(
        base=base, experts={n: tmp_path / n for n in "ab"}, tasks=tasks, output=tmp_path / "out",
        methods=["average", "task_arithmetic"], searches=[0.5, 1.0], resamples=10,
    )  # fmt: skip
    rows = {row.name: row for row in found.rows}
    assert all(row.error is None for row in found.rows) and len(rows) == 4
    # The sum of two at 0.5 is their mean at 1.
    assert rows["average@1"].tasks == rows["task_arithmetic@0.5"].tasks
