"""Results and routed models as their files say them, for tests of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What would run, break out of its place, or change the reading of what stands beside it.
HOSTILE = (
    "<script>window.ran=1</script>",
    "\"><img src=x onerror=window.ran=1>",
    "'><svg/onload=window.ran=1>",
    "</script><script>window.ran=1</script>",
    "</title></style></textarea><script>window.ran=1</script>",
    "{{ 7*7 }}{% raw %}{{ config }}",
    "javascript:window.ran=1",
    "a\u202eb\u2066c\u2028d",
    "<!--<script>",
    "`|*_[x](javascript:window.ran=1)\\",
)  # fmt: skip


def results(
    models: Mapping[str, Mapping[str, float]],
    experts: Mapping[str, float],
    base: Mapping[str, float] | None = None,
    *,
    differences: Sequence[tuple[str, str, float, float]] = (),
    metric: str = "accuracy",
    higher: bool = True,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return results.json of models on tasks; intervals reach 0.02 to both sides.

    `differences` are (model, other, difference of the shares, half the width of its interval).
    """
    tasks = list(experts)

    def figures(value: float, share: float | None, nai: float | None) -> dict[str, Any]:
        return {
            "value": value, "interval": [value - 0.02, value + 0.02], "standard_error": 0.01,
            "normalized": share,
            "normalized_interval": None if share is None else [share - 0.02, share + 0.02],
            "nai": nai, "nai_interval": None if nai is None else [nai - 0.1, nai + 0.1],
        }  # fmt: skip

    def of(value: float, task: str) -> dict[str, Any]:
        share = value / experts[task] if higher else experts[task] / value
        low = None if base is None else base[task]
        gain = (
            None if low is None or experts[task] == low else (value - low) / (experts[task] - low)
        )
        return figures(value, share, gain)

    def mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        def over(key: str) -> float | None:
            held = [row[key] for row in rows]
            return None if None in held else sum(held) / len(held)

        value = over("value")
        assert value is not None
        return figures(value, over("normalized"), over("nai"))

    held = {**({"base": base} if base is not None else {}), **models}
    rows = {n: [of(own[t], t) for t in tasks] for n, own in held.items()}
    whole = {t: [of(experts[t], t)] for t in tasks}
    roles = {"base": "base"} if base is not None else {}
    roles |= {f"expert of {t}": "expert" for t in tasks} | dict.fromkeys(models, "model")
    return {
        "schema_version": 1, "split": "test", "limit": None, "dtype": "float32", "seed": 0,
        "resamples": 1000, "versions": {"eutectic": "0"},
        "checkpoints": [
            {"name": n, "role": role, "path": n, "fingerprint": "f" * 8, "routing": None}
            for n, role in roles.items()
        ],
        "tasks": [
            {"name": t, "kind": "text-classification", "expert": f"expert of {t}",
             "metric": metric, "higher_is_better": higher, "split": "test", "n": 200,
             "data_hash": "d" * 64, "splits": {"test": 200}, "head_hashes": {}}
            for t in tasks
        ],
        "results": [
            *({"checkpoint": n, "task": t, "n": 200, **row}
              for n, own in rows.items() for t, row in zip(tasks, own, strict=True)),
            *({"checkpoint": f"expert of {t}", "task": t, "n": 200, **whole[t][0]} for t in tasks),
        ],
        "means": [
            *({"checkpoint": n, "tasks": tasks, **mean(own)} for n, own in rows.items()),
            {"checkpoint": "experts", "tasks": tasks, **mean([r for [r] in whole.values()])},
        ],
        "differences": [
            {"checkpoint": one, "other": other, "value": d, "interval": [d - half, d + half],
             "standard_error": half / 2, "normalized": d,
             "normalized_interval": [d - half, d + half], "normalized_standard_error": half / 2}
            for one, other, d, half in differences
        ],
        "notes": list(notes),
    }  # fmt: skip


def curve(values: Mapping[float, float], chosen: float, **changed: Any) -> dict[str, Any]:
    """Return a tuning record, a single task's part equal to the value."""
    points = [
        {"scale": scale, "value": value, "parts": {"a": value, "b": value}}
        for scale, value in values.items()
    ]
    return {
        "method": "iso_c", "search": "validation", "objective": "mean share of the experts",
        "scale": chosen, "maximise": True, "points": points, **changed,
    }  # fmt: skip


def routed(experts: Sequence[str], layers: int = 4, **quality: Any) -> dict[str, Any]:
    """Return routed.json with the quality of its routers."""
    names = [f"encoder.layer.{i}.attention.self.query.weight" for i in range(layers)]
    shares = {n: {e: 0.5 + 0.1 * i for e in experts} for i, n in enumerate(names)}
    told = {
        "measured": True, "chance": 1 / len(experts), "samples": dict.fromkeys(experts, 100),
        "decisions": dict.fromkeys(experts, 0.9), "layers": shares,
        "confusion": {t: {e: 0.9 if e == t else 0.1 for e in experts} for t in experts},
    }  # fmt: skip
    return {
        "format": 1, "architecture": "BertModel", "experts": list(experts),
        "router": "discriminant", "accumulate": True, "batch_first": True, "short": {},
        "layers": [{"name": n, "path": n} for n in names], "quality": {**told, **quality},
    }  # fmt: skip


def hostile_sources(folder: Path) -> list[object]:
    """Return sources with hostile strings in every place that a text may stand."""
    names = [f"{text} {i}" for i, text in enumerate(HOSTILE)]
    told = results(
        {n: {t: 0.5 + 0.01 * i for t in names} for i, n in enumerate(names)},
        dict.fromkeys(names, 0.7), dict.fromkeys(names, 0.4), notes=names,
    )  # fmt: skip
    parts = [{"scale": s, "value": 0.1 * s, "parts": dict.fromkeys(names, s)} for s in (1.0, 2.0)]
    curves = [
        curve({}, 1.0, points=parts, objective=n, method=n, search=n) for n in names
    ]  # fmt: skip
    tensors = {
        f"encoder.layer.{i}.{n}": {
            "treatment": "matrix", "method": n, "scale": 1.0, "reason": n, "sha256": n,
        }
        for i, n in enumerate(names)
    }  # fmt: skip
    record = {"matrix": {"status": names[0], "residuals": [1.0, 0.5, 0.1]}}
    made = {
        "eutectic": names[0], "torch": names[1], "method": names[2], "mostly_by": names[3],
        "scale": 1.0, "recipe": {n: n for n in names}, "notes": names,
        "treatments": dict.fromkeys(names, 2), "merged_by": dict.fromkeys(names, 1),
        "parents": {n: {"name": n, "licence": n, "fingerprint": n, "statistics": {n: n}}
                    for n in names},
        "tensors": tensors, "records": dict.fromkeys(tensors, record),
        "norms": {"ratio": 5.0, "bound": 3.0}, "fallback": {"share": 0.5},
        "calibration": {"calibrated": {names[0]: 1}, "data": {n: {"examples": 1} for n in names}},
    }  # fmt: skip
    merged = folder / "<b>merged"
    merged.mkdir()
    (merged / "eutectic.json").write_text(json.dumps(made), encoding="utf-8")
    (merged / "routed.json").write_text(json.dumps(routed(names)), encoding="utf-8")
    plan = {
        "method": names[0], "scale": 1.0, "cost": {"seconds": 1.0}, "merged_by": {names[0]: 1},
        "notes": names,
        "tensors": [{"name": n, "shape": [1], "treatment": n, "method": n, "why": n}
                    for n in names],
    }  # fmt: skip
    return [told, *curves, merged, plan]
