"""Does matching improve on its initial merge, and on the closed form? Steps against accuracy.

    python benchmarks/table/matching_claims.py text --work DIR --regime hard --tasks 4 --seeds 3

Conjugate gradients on input Grams (`gram`) and on K-FAC start at an initial merge at its best α on
validation and take 3, 10, 30 or 100 steps; `kronecker` rows are preconditioned. RegMean is the
closed form. Every solution takes the α of a grid that is best on validation with the first proxy
sample and keeps it for further samples; "at 1" is the first as it is, as published. Resumable.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from table.merging import ROWS, Row, collect_statistics, merge_row
from table.run import by_validation, cached, check_settings, fixed_models, initial_merge, load_suite
from table.suite import Suite, accuracies, mean, set_parameters

INITIAL = ("task_arithmetic", "iso_c")
STEPS = (3, 10, 30, 100)
PRECONDITIONED_STEPS = (3, 10)
DAMPINGS = (0.01, 0.1, 1.0)  # with the preconditioner and ten steps: near the damped solution
GRID = (0.25, 0.35, 0.5, 0.7, 1.0)


def rows() -> dict[str, Row]:
    """The initial merges, the closed forms and the systems, the cheap ones first."""
    found = {name: ROWS[name] for name in (*INITIAL, "regmean")}
    found["regmean_1"] = Row("regmean", {"off_diagonal": 1.0}, seeded=True)
    for operator in ("gram", "kfac"):
        for init in INITIAL:
            shared = {"operator": operator}
            for steps in PRECONDITIONED_STEPS if operator == "kfac" else ():
                own = {**shared, "iterations": steps, "preconditioner": "kronecker"}
                own["damping"] = 0.0
                found[f"{operator}_{init}_kronecker_{steps}"] = Row(
                    "mats", own, seeded=True, init=init
                )
            for damping in DAMPINGS if operator == "kfac" else ():
                own = {**shared, "iterations": 10, "preconditioner": "kronecker"}
                found[f"{operator}_{init}_damped_{damping:g}"] = Row(
                    "mats", {**own, "damping": damping}, seeded=True, init=init
                )
            for steps in STEPS:
                own = {**shared, "iterations": steps}
                found[f"{operator}_{init}_{steps}"] = Row("mats", own, seeded=True, init=init)
    return found


def measured(suite: Suite, name: str, row: Row, work: Path, results: Path, seed: int) -> Any:
    """One merge: accuracy on the test texts at the α that validation chose, and at 1."""
    init = initial_merge(row, results)
    files = collect_statistics(suite, work, seed, **row.statistics) if row.seeded else None
    merged = merge_row(suite, row, work, seed, files, init)

    def on(split: str, scale: float) -> dict[str, float]:
        set_parameters(suite.model, merged.base, merged.deltas, scale)
        return accuracies(suite, suite.model, split)

    if seed:
        scale = json.loads((results / f"{name}-0.json").read_text())["scale"]
    elif row.seeded:
        scale = max(GRID, key=lambda value: mean(on("validation", value)))
    else:
        scale = by_validation(suite, merged, row.start).scale
    record = {"scale": scale, "seconds": merged.seconds, "test": on("test", scale)}
    if row.seeded and not seed:
        record["test_at_one"] = record["test"] if scale == 1 else on("test", 1.0)
    return record


def table(results: Path, base: float, experts: float) -> str:
    """Mean accuracy over tasks, ± its spread over proxy samples, as Markdown."""
    lines = [
        "| merge | accuracy at the chosen α | α | accuracy at 1 | seconds |",
        "|---|---|---|---|---|",
        f"| base | {base:.1f} |  |  |  |",
    ]
    for name in rows():
        files = sorted(results.glob(f"{name}-[0-9].json"))
        found: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]
        if not found:
            continue
        chosen = _spread([mean(row["test"]) for row in found])
        at_one = [f"{mean(row['test_at_one']):.2f}" for row in found if "test_at_one" in row]
        cells = [name, chosen, f"{found[0]['scale']:.2g}", *(at_one or [""])]
        lines.append("| " + " | ".join([*cells, f"{found[0]['seconds']:.1f}"]) + " |")
    return "\n".join([*lines, f"| experts | {experts:.1f} |  |  |  |", ""])


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    """Fill what is missing and print the table."""
    parser = argparse.ArgumentParser(description="Steps of conjugate gradients against accuracy.")
    parser.add_argument("suite", choices=["text", "glyphs"])
    parser.add_argument("--work", type=Path, required=True, help="folder of the suite's experts")
    parser.add_argument("--regime", default="hard", help="kind or hard")
    parser.add_argument("--tasks", type=int, default=4, help="the first so many tasks")
    parser.add_argument("--seeds", type=int, default=3, help="proxy samples")
    parser.add_argument("--rows", nargs="*", help="default: all; initial merges come first")
    parser.add_argument("--validation-texts", type=int, default=150, help="of every task")
    parser.add_argument("--test-texts", type=int, help="of every task; default: all")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    suite = load_suite(arguments)
    results = arguments.work / "results" / f"{suite.name}-matching"
    check_settings(suite, results)
    fixed = fixed_models(suite, results)
    base, experts = mean(fixed["base"]), mean(fixed["experts"])
    chosen = {n: row for n, row in rows().items() if arguments.rows is None or n in arguments.rows}
    for seed, (name, row) in product(range(arguments.seeds), chosen.items()):
        if seed and not row.seeded:
            continue
        file = results / f"{name}-{seed}.json"
        compute = partial(measured, suite, name, row, arguments.work, results, seed)
        made = cached(file, compute)
        print(f"{name} {seed}: α {made['scale']:.3g}, {mean(made['test']):.2f}", flush=True)
    text = table(results, base, experts)
    (results / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
