"""Sources from elsewhere, and large ones: a report is made in bounds, or refused in words."""

from __future__ import annotations

import json
import math
import time

from hypothesis import given, settings
from hypothesis import strategies as st

import eutectic
from eutectic.errors import EutecticError
from eutectic.reporting.page.page_record import Report
from eutectic.reporting.schema import Inspection
from helpers.fuzzing import as_json, mutated
from helpers.reports import curve, results, routed

_RECORD = {"matrix": {"status": "converged", "residuals": [1.0, 0.1]}, "adapter": {"rank": 1}}
VALID = {
    "results.json": results(
        {"x": {"a": 0.5, "b": 0.3}, "y": {"a": 0.7, "b": 0.2}}, {"a": 0.8, "b": 0.5},
        {"a": 0.4, "b": 0.2}, differences=[("x", "y", 0.1, 0.2)],
    ),
    "tune.json": curve({0.1: 0.2, 0.5: 0.4, 1.0: 0.3}, 0.5),
    "routed.json": routed(["a", "b"], 2),
    "plan.json": {
        "method": "iso_c", "scale": 1.0, "cost": {"seconds": 1.0, "peak_bytes": 10.0},
        "merged_by": {"iso_c": 1}, "shares": {"merged": 1.0, "kept": 0.0, "left": 0.0},
        "notes": ["n"], "threads": 1,
        "tensors": [{"name": "l.0.w", "shape": [2, 2], "treatment": "matrix", "method": "iso_c",
                     "scale": 1.0, "why": "w"}],
    },
    "eutectic.json": {
        "eutectic": "0", "torch": "2", "recipe": {"method": "iso_c", "base": "b"}, "scale": 1.0,
        "treatments": {"matrix": 2}, "merged_by": {"iso_c": 1, "average": 1},
        "mostly_by": "iso_c", "fallback": {"share": 0.5}, "norms": {"ratio": 1.0, "bound": 3.0},
        "shares": {"merged": 1.0}, "notes": ["n"],
        "parents": {"base": {"name": "b", "licence": "mit", "fingerprint": "f"},
                    "a": {"name": "a", "statistics": {"examples": 3, "fingerprint": "f"}}},
        "tensors": {f"l.{i}.w": {"treatment": "matrix", "method": m, "scale": 1.0, "reason": "r",
                                 "sha256": "s"} for i, m in enumerate(["iso_c", "average"])},
        "records": {"l.0.w": _RECORD},
        "search": {"search": "norm", "objective": "o", "scale": 1.0, "maximise": False,
                   "points": [{"scale": 1.0, "value": 0.5, "parts": {}}]},
        "calibration": {"calibrated": {"matrices": 1}, "data": {"a": {"examples": 2}},
                        "layers": {"l.0.w": {"before": 1.0, "after": 0.5}}},
    },
}  # fmt: skip


@settings(max_examples=80)
@given(st.data())
def test_a_mutated_source_is_reported_on_or_refused(tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(VALID)))
    path = tmp_path_factory.mktemp("fuzzed") / name
    path.write_bytes(as_json(data.draw(mutated(VALID[name]))))
    try:
        report = eutectic.report(path)
    except EutecticError as error:
        assert str(error).count("\n") <= 6
        return
    report.html()
    report.markdown()
    assert Report.model_validate_json(report.json_text()) == report


def large_inspection(layers: int, experts: int, merged: int) -> Inspection:
    """Return an inspection of a Llama-shaped model, 64 singular values a spectrum."""
    names = [f"expert_{i}" for i in range(experts)]
    models = [f"merge_{i}" for i in range(merged)]
    values = [math.exp(-i / 9) for i in range(64)]
    spectrum = {
        "norm": 2.0, "relative_norm": 0.02, "stable_rank": 3.0, "effective_rank": 40.0,
        "energy": 0.6, "rank": 4096, "positions": [1 + i * 64 for i in range(64)],
        "values": values,
    }  # fmt: skip
    table = [[0.123456] * experts for _ in names]
    pairs = dict.fromkeys(
        ("cosine", "overlap_left", "overlap_right", "sign_conflicts", "singular"), table
    )
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up")]
    rows = [
        {
            "name": f"model.layers.{i}.{part}.weight", "shape": [4096, 4096], "leading": 512,
            "base_norm": 60.0, "experts": dict.fromkeys(names, spectrum), "sum": spectrum,
            "merged": dict.fromkeys(models, spectrum),
            "alignment": {m: {"rank": 9, "ratio": dict.fromkeys(names, 0.9 - i / 99)}
                          for m in models},
            "singular_task_interference": 1.0, "interference": pairs,
        }
        for i in range(layers)
        for part in [*parts, "mlp.down_proj"]
    ]  # fmt: skip
    task = {
        "norm": 1.0, "relative_norm": 0.1, "stable_rank": 1.0, "effective_rank": 1.0,
        "most_interfering": names[0], "interference": 0.1, "by": "singular",
    }  # fmt: skip
    return Inspection.model_validate(
        {
            "eutectic": "0", "base": "b", "experts": dict.fromkeys(names, "p"),
            "merged": dict.fromkeys(models, "p"), "error": 0.05, "pattern": None, "notes": [],
            "summary": {"tasks": dict.fromkeys(names, task), "merged": {}, "correlation": None,
                        "interference": pairs},
            "layers": rows,
        }
    )  # fmt: skip


def test_a_page_of_32_layers_is_small(tmp_path):
    found = large_inspection(32, experts=8, merged=3)
    tensors = {
        f"{layer.name}{suffix}": {
            "treatment": "matrix", "method": "iso_c", "scale": 1.0, "sha256": "0123456789" * 6,
            "reason": "matrix",
        }
        for layer in found.layers
        for suffix in ("", ".absmax")
    }  # fmt: skip
    folder = tmp_path / "merged"
    folder.mkdir()
    record = {"matrix": {"status": "iteration limit", "residuals": [0.9**i for i in range(100)]}}
    made = {**VALID["eutectic.json"], "tensors": tensors, "records": dict.fromkeys(tensors, record)}
    (folder / "eutectic.json").write_text(json.dumps(made))
    report = eutectic.report(found, folder)
    assert len(report.html()) < 5_000_000
    (layers, *_) = report.maps
    assert (len(layers.rows), len(layers.columns)) == (32, 7)
    assert layers.rows[2] == "model.layers.2"


def test_twelve_models_take_under_three_seconds(tmp_path):
    tasks = [f"task_{i}" for i in range(8)]
    models = {f"m{j}": {t: 0.5 + 0.02 * j for t in tasks} for j in range(12)}
    paired = [(a, b, 0.01, 0.02) for a in models for b in models if a != b]
    told = results(models, dict.fromkeys(tasks, 0.8), dict.fromkeys(tasks, 0.4), differences=paired)
    (tmp_path / "results.json").write_text(json.dumps(told))
    before = time.process_time()
    report = eutectic.report(tmp_path / "results.json", output=tmp_path / "report.html")
    # The processor's time, which does not depend on what else runs: a tenth of what is allowed.
    assert time.process_time() - before < 3
    assert len(report.scores[0].models) == 14
