"""`eutectic tune` as users run it."""

from __future__ import annotations

import json
import sys

import pytest
import typer.testing
import yaml

from eutectic.cli.main import app
from eutectic.errors import RequestError
from eutectic.tuning import search as curves

pytest.importorskip("transformers")
from tuning import world  # noqa: E402 - after the check that transformers is there


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = world.build(tmp_path_factory.mktemp("world"))
    recipe = {
        "base": "./base",
        "experts": {name: f"./{name}" for name in world.CLASSES},
        "method": "iso_c",
        "scale": {"search": "divergence", "tasks": "tasks.yaml", "points": 5, "tolerance": 0.2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def run(*words):
    return typer.testing.CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "160"})


def test_the_curve_as_a_table_and_as_json(folder, tmp_path):
    shown = run("tune", folder / "recipe.yaml", "--work", tmp_path / "work")
    assert shown.exit_code == 0, shown.output
    told = run("tune", folder / "recipe.yaml", "--work", tmp_path / "work", "--json")
    record = json.loads(told.stdout)
    assert f"α = {record['scale']:.2g}" in shown.stdout and "█" in shown.stdout
    assert shown.stdout.count("◀") == 1 and "left" in shown.stdout
    assert len(record["points"]) >= 5 and record["search"] == "divergence"


def test_options_win_over_the_recipe(folder, tmp_path):
    words = ("--search", "validation", "--tasks", folder / "tasks.yaml", "--range", "0.1:2")
    words = (*words, "--points", 4, "--tolerance", 0.3, "-o", tmp_path / "out", "--json")
    result = run("tune", folder / "recipe.yaml", *words)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    made = json.loads((tmp_path / "out" / "eutectic.json").read_text())
    assert record["search"] == "validation" and record["range"] == [0.1, 2.0]
    assert made["search"]["points"] == record["points"] and made["scale"] == record["scale"]


def test_merge_searches_and_plan_says_so(folder, tmp_path):
    planned = run("plan", folder / "recipe.yaml")
    assert planned.exit_code == 0 and "scale by divergence" in planned.stdout
    assert "searched" in planned.stdout
    result = run("merge", folder / "recipe.yaml", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "chosen by divergence" in " ".join(result.stdout.split())
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--range", "2"), "--range '2' must be LOW:HIGH"),
        (
            ("--search", "grid"),
            "--search: should be 'validation', 'divergence', 'gram' or 'norm'",
        ),
        (("--plot", "curve.txt"), "a plot's name ends with .png, .svg, .pdf"),
        (("--tasks", "nowhere.yaml"), "--tasks: no such file: nowhere.yaml"),
        (("--set", "scale=1.0"), "not a search"),
    ],
)
def test_refusals(folder, words, message):
    result = run("tune", folder / "recipe.yaml", *words)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


def test_a_plot_without_matplotlib_is_refused_first(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run("tune", folder / "recipe.yaml", "--plot", tmp_path / "curve.png")
    assert result.exit_code == 1
    assert "pip install 'eutectic[plots]'" in " ".join(result.stderr.split())


def test_a_plot_has_its_numbers_beside_it(folder, tmp_path):
    pytest.importorskip("matplotlib")
    words = ("tune", folder / "recipe.yaml", "--work", tmp_path / "work")
    shown = run(*words, "--plot", tmp_path / "curve.png")
    assert shown.exit_code == 0, shown.output
    assert "curve.png" in shown.stdout and "curve.json" in shown.stdout
    numbers = (tmp_path / "curve.json").read_text()
    again = run(*words, "--plot", tmp_path / "curve.svg", "--json")
    assert json.loads(numbers) == json.loads(again.stdout)
    assert (tmp_path / "curve.json").read_text() == numbers and len(json.loads(numbers)["points"])
    other = tmp_path / "results.json"
    other.write_text('{"results": []}')
    refused = run(*words, "--plot", tmp_path / "results.png")
    assert refused.exit_code == 2
    assert "results.json: the curve's numbers would be written" in " ".join(refused.stderr.split())
    assert other.read_text() == '{"results": []}'


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    points = [
        {"scale": s, "value": v, "parts": {"a": v, "b": v}}
        for s, v in ((0.1, 1.0), (1.0, 0.5), (3.0, None))
    ]
    search = {"scale": 1.0, "objective": "of a test", "points": points}
    for ending in curves.FORMATS:
        file = tmp_path / f"curve{ending}"
        curves.plot_curve(search, file)
        assert file.stat().st_size > 1000
        curves.plot_curve(search, file)  # over a plot of its own
        file.write_bytes(file.read_bytes().replace(b"eutectic", b"somebody"))
        before = file.read_bytes()
        with pytest.raises(RequestError, match="a plot would be drawn there"):
            curves.plot_curve(search, file)
        assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("metric", "expected"), [("accuracy", [0.5, 1.5]), ("perplexity", [2.0, 2 / 3])]
)
def test_metrics_are_drawn_as_shares_of_the_experts(tmp_path, monkeypatch, metric, expected):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path, dpi: drawn.append(figure))
    points = [{"scale": s, "value": 1.0, "parts": {"a": v}} for s, v in ((0.1, 20.0), (1.0, 60.0))]
    search = {
        "scale": 1.0, "objective": "of a test", "points": points,
        "experts": {"a": 40.0}, "tasks": {"a": {"metric": metric}},
    }  # fmt: skip
    curves.plot_curve(search, tmp_path / "curve.png")
    axes = drawn[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for one in axes for line in one.lines}
    assert lines["a"] == pytest.approx(expected) and lines["objective"] == [1.0, 1.0]
    assert json.loads((tmp_path / "curve.json").read_text())["points"] == points


def test_one_bad_value_does_not_flatten_the_curve(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path, dpi: drawn.append(figure))
    values = {0.1: 0.62, 0.2: 0.55, 0.4: 0.48, 0.8: 0.45, 1.0: 0.453, 1.5: 0.5, 3.0: 40.0}
    points = [{"scale": s, "value": v, "parts": {"a": v, "b": 2 * v}} for s, v in values.items()]
    search = {"scale": 0.8, "objective": "of a test", "points": points, "method": "iso_c"}
    curves.plot_curve(search, tmp_path / "curve.png")
    upper, lower = drawn[0].axes
    low, high = upper.get_ylim()
    assert low < 0.45 and 0.5 < high < 2  # the valley fills the frame
    assert lower.get_ylim()[1] < 4
    assert [text.get_text() for text in upper.texts][-1] == "40"  # what lies outside has its number
    assert upper.get_title() == "iso_c: α = 0.8 is best (0.45)\nwithin 1 % of it: α from 0.8 to 1"
    # Where the best one is the last that was tried, the title says so.
    curves.plot_curve({**search, "scale": 3.0, "maximise": True}, tmp_path / "edge.png")
    assert "at the edge of what was tried" in drawn[1].axes[0].get_title()
