"""What returned objects show of themselves in a notebook, and their data frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from eutectic.errors import RequestError
from eutectic.statistics import collect
from helpers.cli import invoke
from helpers.folders import make_base, make_expert, save
from helpers.models import save_family

pandas: Any = pytest.importorskip("pandas")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("reprs")
    base = make_base(layers=2, width=8)
    experts = {name: save(folder / name, make_expert(base, i)) for i, name in enumerate("ab")}
    return {"base": save(folder / "base", base), "experts": experts}


def is_short(shown: str, lines: int = 60, columns: int = 130) -> bool:
    return len(shown.splitlines()) <= lines and max(map(len, shown.splitlines())) <= columns


def test_a_plan(inputs: dict[str, Any], tmp_path: Path):
    found = eutectic.plan(**inputs, method="iso_c", scale=0.5)
    shown = repr(found)
    assert "layers.*.proj.weight ×2" in shown and "iso_c, scale 0.5" in shown and is_short(shown)
    frame = found.to_pandas()
    tensors = make_base(layers=2, width=8)
    assert set(frame.index) == set(tensors)
    assert frame.loc["layers.1.proj.weight", "shape"] == [16, 8]
    assert frame.loc["layers.1.proj.weight", "method"] == "iso_c"
    assert found.merged_by["iso_c"] == 2 and found.scale == 0.5
    assert not list(tmp_path.iterdir())
    # The command prints the same.
    words = ["plan", "--base", inputs["base"], "-m", "iso_c", "--scale", 0.5]
    told = invoke(*words, *(f"{n}={p}" for n, p in inputs["experts"].items())).out
    assert "layers.*.proj.weight ×2 16×8 matrix iso_c 0.5" in told
    with pytest.raises(RequestError, match="iso_d"):
        eutectic.plan(**inputs, method="iso_d")


def test_a_merge(inputs: dict[str, Any], tmp_path: Path):
    report = eutectic.merge(**inputs, method="iso_c", scale=0.5, output=tmp_path / "out")
    shown = repr(report)
    assert shown.startswith("MergeReport\n") and is_short(shown)
    assert "iso_c, scale 0.5" in shown and str(tmp_path / "out") in shown


def test_a_search_shows_its_curve(inputs: dict[str, Any], tmp_path: Path):
    from helpers.folders import load

    statistics = {}
    for name, folder in inputs["experts"].items():
        layers = torch.nn.ModuleDict()
        weights = {k: v for k, v in load(folder).items() if k.endswith("proj.weight")}
        layers["layers"] = torch.nn.ModuleList(
            torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 16, bias=False)}) for _ in weights
        )
        layers.load_state_dict(weights)
        layers.forward = lambda x, own=layers: [m["proj"](x) for m in own["layers"]]
        file = tmp_path / f"{name}.stats.safetensors"
        saved = collect(layers, [torch.randn(20, 8)], file)
        shown = repr(saved)
        assert shown.startswith("StatisticsFile\n") and "gram" in shown and is_short(shown)
        assert set(saved.to_pandas().index) == set(weights)
        assert "gram=[8, 8]" in repr(saved["layers.0.proj.weight"])
        statistics[name] = file
    experts = {n: {"path": p, "statistics": statistics[n]} for n, p in inputs["experts"].items()}
    rules = [{"match": "*.proj.weight", "treatment": "matrix"}]
    report = eutectic.tune(
        base=inputs["base"],
        experts={n: {k: str(v) for k, v in own.items()} for n, own in experts.items()},
        method="iso_c",
        tensors=rules,
        search={"search": "gram"},
    )
    assert "◀" in repr(report) and is_short(repr(report))
    frame = report.to_pandas()
    assert list(frame.index) == [p["scale"] for p in report.search["points"]]
    assert frame["objective"].idxmin() == pytest.approx(report.scale, rel=0.2)


def test_an_evaluation_and_an_inspection(tmp_path: Path):
    base, experts = save_family("bert", tmp_path, 2, dtype=torch.float32)
    eutectic.merge(base=base, experts=experts, method="iso_c", output=tmp_path / "m")
    found = eutectic.inspect(base=base, experts=experts, merged={"m": tmp_path / "m"})
    shown = repr(found)
    assert shown == str(found) and "SAR" in shown and is_short(shown)
    frame = found.to_pandas()
    assert set(frame["model"]) == {"e0", "e1", "m"} and len(frame) == 3 * len(found.layers)
    first = found.layers[0]
    row = frame[(frame["layer"] == first.name) & (frame["model"] == "e0")].iloc[0]
    assert row["norm"] == first.experts["e0"].norm

    code = tmp_path / "f.py"
    code.write_text("def f(folder, rows):\n    return [float(folder.endswith('m')), 0.5]\n")
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(f"tasks:\n  t: {{kind: function, function: '{code}:f', expert: e0}}\n")
    results = eutectic.evaluate(
        tasks, base=base, experts={"e0": experts["e0"]}, models={"m": tmp_path / "m"},
        trust_code=True,
    )  # fmt: skip
    shown = repr(results)
    assert shown.startswith("Results\n") and "NAI" in shown and is_short(shown)
    frame = results.to_pandas().set_index(["checkpoint", "task"])
    assert frame.loc[("m", "t"), "value"] == 0.75
    low, high = frame.loc[("m", "t"), ["interval_low", "interval_high"]]
    assert (low, high) == next(r.interval for r in results.results if r.checkpoint == "m")


def test_the_methods_and_a_check(inputs: dict[str, Any]):
    table = eutectic.methods()
    assert isinstance(table, dict) and repr(table).count("\n") == len(table) - 1
    assert table.to_pandas().loc["iso_c", "summary"] == table["iso_c"]["summary"]
    found = eutectic.check(*inputs["experts"].values())
    assert repr(found).startswith("CheckReport: ") and len(found.to_pandas()) == 2
