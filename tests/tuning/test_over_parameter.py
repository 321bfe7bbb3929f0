"""Guards searches over a parameter of the method: each value is that of a merge with it."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

import eutectic
from eutectic.errors import RequestError
from eutectic.methods import get_method
from eutectic.reporting.page.origins import curve_of
from eutectic.reporting.page.source_views import CurveView
from helpers.cli import invoke

pytest.importorskip("transformers")
from tuning import world  # noqa: E402 - after the check that transformers is there

FLOW = {"gram": "task", "init": "zero"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.build(tmp_path_factory.mktemp("world"))


def asked(folder, **options):
    experts = {name: str(folder / name) for name in world.CLASSES}
    search = {
        "search": "divergence",
        "tasks": str(folder / "tasks.yaml"),
        "range": [0.1, 10.0],
        "points": 3,
        "tolerance": 0.6,
    }
    return {
        "base": str(folder / "base"),
        "experts": experts,
        "method": "flow",
        "parameters": FLOW,
        "search": search,
        **options,
    }


def test_tau_of_flow_is_found_and_written(folder, tmp_path):
    report = eutectic.tune(**asked(folder), over="tau", at=0.8, output=tmp_path / "out")
    assert (report.over, report.scale) == ("tau", 0.8)
    points = {p["parameter"]: p["value"] for p in report.search["points"]}
    assert {0.1, 1.0, 10.0} <= set(points)
    assert points[report.value] == min(points.values())
    assert report.search["over"] == "tau" and report.search["scale"] == 0.8
    assert report.search["value"] == report.value
    made = json.loads((tmp_path / "out" / "eutectic.json").read_text())
    assert made["recipe"]["parameters"]["tau"] == report.value and made["scale"] == 0.8
    by_hand = tmp_path / "by-hand"
    stated = {key: value for key, value in asked(folder).items() if key != "search"}
    stated["parameters"] = {**FLOW, "tau": report.value}
    eutectic.merge(**stated, scale=0.8, output=by_hand)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", by_hand))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert report.to_pandas().index.name == "tau"
    assert "tau" in repr(report) and "over" not in repr(report).split("\n")[0]
    # A point is what a search over α finds of a merge with that value.
    stated["parameters"] = {**FLOW, "tau": 10.0}
    alone = eutectic.tune(
        **stated, search={**asked(folder)["search"], "range": [0.08, 8.0], "points": 3}
    )
    same = {p["scale"]: p["value"] for p in alone.search["points"]}
    assert same[0.8] == pytest.approx(points[10.0], rel=1e-6)


def test_labels_and_the_default_scale(folder, tmp_path):
    search = {**asked(folder)["search"], "search": "validation", "range": [0.1, 1.0]}
    options = {**asked(folder), "search": search, "method": "ties", "parameters": {}}
    report = eutectic.tune(**options, over="density")
    assert report.scale == get_method("ties").default_scale(2)
    assert report.search["maximise"] and set(report.search["experts"]) == set(world.CLASSES)
    assert report.output is None
    kinds = [note.kind for note in report.note_records]
    assert "searched_parameter" in kinds


def test_the_command_draws_the_path(folder, tmp_path):
    words = ["--base", folder / "base", "-m", "flow", "-p", "gram=task"]
    words += [folder / name for name in world.CLASSES]
    words += ["--search", "divergence", "--tasks", folder / "tasks.yaml", "--points", 3]
    words += ["--tolerance", 0.6, "--range", "0.1:10", "--over", "tau"]
    shown = invoke("tune", *words, "--plot", tmp_path / "path.svg")
    assert shown.code == 0, shown.err
    assert "tau = " in shown.out and "of flow at scale 1" in shown.out
    assert "tau of flow, at scale 1" in (tmp_path / "path.svg").read_text()
    record = json.loads((tmp_path / "path.json").read_text())
    assert record["over"] == "tau" and record["scale"] == 1
    told = json.loads(invoke("tune", *words, "--at", 0.8, "--json").out)
    assert told["scale"] == 0.8
    for search in (record, told):  # one form, which the report reads
        tried = [point["parameter"] for point in search["points"]]
        assert len(tried) >= 3 and search["value"] in tried
        curve = curve_of("search", CurveView.model_validate(search))
        assert (curve.symbol, curve.chosen) == ("tau", search["value"])
        assert [point.scale for point in curve.points] == tried
    refused = invoke("tune", *[*words, "--search", "auto"])
    assert refused.code == 2 and "validation or divergence (--search)" in refused.err
    refused = invoke("tune", *[*words, "--range", "0:10"])
    assert refused.code == 2 and "--range: should be greater than 0" in refused.err


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"over": "taus"}, "'taus' is no parameter of 'flow'.*did you mean 'tau'|Did you mean"),
        ({"over": "rank"}, "takes real numbers"),  # whole ones
        ({"over": "tau", "work": "somewhere"}, "Leave work"),
        ({"over": "tau", "restart": True}, "none is kept without output"),
        ({"at": 1.0}, "name it by over"),
        ({"over": "tau", "search": "norm"}, "runs the merged model on data"),
        ({"over": "tau", "range": None}, "needs a range"),
        ({"over": "density", "method": "ties", "parameters": {}}, "0.1 to 10 .--range.*density"),
    ],
)
def test_refusals(folder, said, message):
    options = {**asked(folder), **{k: v for k, v in said.items() if k != "range"}}
    if "range" in said:
        options["search"] = {k: v for k, v in options["search"].items() if k != "range"}
    with pytest.raises(RequestError, match=message):
        eutectic.tune(**options)
