"""Results of one suite as a Markdown table and one JSON file."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from table.outcomes import write_differences
from table.suite import mean, normalised


def write_table(results: Path) -> str:
    """Read every result of a suite, write the table and all of them beside it.

    That is `table.md`, `results.json`, and `differences.json` where outcomes are kept.
    """
    fixed = {
        name: json.loads((results / f"{name}.json").read_text()) for name in ("base", "experts")
    }
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for file in sorted(results.glob("*-[0-9].json")):
        name, _, _ = file.stem.rpartition("-")
        rows[name].append(json.loads(file.read_text()))
    entries = [_entry(name, found, fixed["experts"]) for name, found in rows.items()]
    entries.sort(key=lambda entry: entry["normalised"])
    for name in ("base", "experts"):
        share = normalised(fixed[name], fixed["experts"])
        entries.insert(
            0 if name == "base" else len(entries),
            {"row": name, "accuracy": mean(fixed[name]), "normalised": share},
        )
    errors = write_differences(results)
    for entry in entries:
        entry["error"] = errors.get(entry["row"])
    text = _markdown(entries)
    (results / "table.md").write_text(text)
    settings = results / "settings.json"
    document = {
        "suite": results.name,
        "settings": json.loads(settings.read_text()) if settings.is_file() else None,
        "fixed": fixed,
        "entries": entries,
        "rows": rows,
    }
    (results / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    return text


def _entry(name: str, found: list[dict[str, Any]], experts: dict[str, float]) -> dict[str, Any]:
    """Mean over proxy samples, with the label-free α of the first."""
    shares = [normalised(row["test"], experts) for row in found]
    entry: dict[str, Any] = {
        "row": name,
        "accuracy": fmean(mean(row["test"]) for row in found),
        "normalised": fmean(shares),
        "deviation": stdev(shares) if len(shares) > 1 else None,
        "samples": len(found),
        "scale": found[0].get("scale"),
    }
    for kind in ("divergence", "grams", "held_out"):
        if kind in found[0]:
            entry[kind] = {
                "scale": found[0][kind]["scale"],
                "normalised": normalised(found[0][kind]["test"], experts),
            }
    if "seconds" in found[0]:
        entry |= {"seconds": found[0]["seconds"], "peak_bytes": found[0]["peak_bytes"]}
    if found[0].get("decisions"):
        entry["decisions"] = fmean(
            fmean(layers.values()) for row in found for layers in row["decisions"].values()
        )
    return entry


def _markdown(entries: list[dict[str, Any]]) -> str:
    head = ("method", "accuracy", "% of experts", "α", "α by KL", "α by Grams", "merge", "peak")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for entry in entries:
        spread = entry.get("deviation")
        share = f"{entry['normalised']:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")
        scale = f"{entry['scale']:.2g}" if entry.get("scale") else ""
        free = [
            f"{entry[k]['normalised']:.1f} ({entry[k]['scale']:.2g})" if k in entry else ""
            for k in ("divergence", "grams")
        ]
        cost = (
            [f"{entry['seconds']:.1f} s", f"{entry['peak_bytes'] / 1e9:.2f} GB"]
            if "seconds" in entry
            else ["", ""]
        )
        cells = [entry["row"], f"{entry['accuracy']:.1f}", share, scale, *free, *cost]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
