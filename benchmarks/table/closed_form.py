"""Why the closed form of α is near the labelled one on some suites and not on others.

    python benchmarks/table/closed_form.py text --work DIR --regime hard --tasks 8

For every row that `run.py` has measured: the α of least squares on layer outputs, the α at which
the merged model moves an expert's outputs as far along the expert's own shift as the expert does
(unit gain, ignoring what it moves sideways), the labelled α, and the mean squared error of layer
outputs that the labelled α accepts (1: as far from the expert as the base is). Before the table,
how large the experts' shifts are: the root of Σ‖Δ_t x‖² / Σ‖W x‖² over their own inputs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from table.merging import ROWS, collect_statistics, merge_row
from table.run import load_suite

from eutectic.statistics import load_statistics
from eutectic.tuning.output_error import OutputTerms, closed_form_scale, output_terms


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", choices=["text", "glyphs", "adapters"])
    parser.add_argument("--work", type=Path, required=True, help="folder of the suite's experts")
    parser.add_argument("--regime", default="hard")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rows", nargs="*", default=["task_arithmetic", "tsv_m", "iso_c", "iso_a"])
    arguments = parser.parse_args()
    suite = load_suite(arguments)
    results = arguments.work / "results" / suite.name
    files = collect_statistics(suite, arguments.work, 0)
    statistics = [load_statistics(files[task]) for task in suite.tasks]
    opened = [safe_open(f / "model.safetensors", "pt") for f in suite.experts.values()]
    base = load_file(suite.base / "model.safetensors")
    names = [
        n for n in base if base[n].ndim == 2 and all(n in s and s[n].count for s in statistics)
    ]

    def terms(merged: dict[str, object] | None = None) -> Iterable[OutputTerms]:
        for name in names:
            whole = base[name] if merged is None else merged.get(name)
            if whole is None:
                continue
            own = [file.get_tensor(name) - base[name] for file in opened]
            yield output_terms(own, whole, [s[name] for s in statistics])

    against = list(terms())
    shift = sum(float(t.expert.sum()) for t in against)
    print(f"shift {(shift / sum(float(t.merged.sum()) for t in against)) ** 0.5:.3f}")
    print("| method | α, least squares | α, unit gain | α, labels | error at the labelled α |")
    print("|---|---|---|---|---|")
    for name in arguments.rows:
        labelled = json.loads((results / f"{name}-0.json").read_text())["scale"]
        row = ROWS[name]
        own = files if row.needs_statistics else None
        form = closed_form_scale(terms(merge_row(suite, row, arguments.work, 0, own).deltas))
        print(
            f"| {name} | {form.scale:.2g} | {form.expert / form.cross:.2g} | {labelled:.2g} "
            f"| {form.error(labelled):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
