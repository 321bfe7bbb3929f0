"""Does subspace alignment tell accuracy? Mean SAR against NAI, over the rows of a table.

    python benchmarks/table/alignment.py text --work DIR --regime hard --tasks 8

Reads the results of `run.py`, which measures a row's alignment with it, and merges again where a
row has none. A task with a gain below two points has an NAI that is mostly noise, and is left out.
Writes `alignment.json` and `alignment.png`. The merged subspace leaves `--error` of the merged
matrix: 0.05 as the paper's equation has it. The paper's published script keeps directions until
the root of their share of the energy is above 0.95, which is an error of 0.312.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from table.merging import ROWS, Row, alignments, collect_statistics, merge_row
from table.run import cached, initial_merge, load_suite

from eutectic.reporting import correlate

SMALLEST_GAIN = 2.0


def main() -> None:
    """Measure, correlate, draw."""
    parser = argparse.ArgumentParser(description="Correlate alignment with accuracy.")
    parser.add_argument("suite", choices=["text", "glyphs", "adapters"])
    parser.add_argument("--work", type=Path, required=True, help="folder of the suite's experts")
    parser.add_argument("--regime", default="hard")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--error", type=float, default=0.05, help="that defines the subspace")
    arguments = parser.parse_args()
    suite = load_suite(arguments)
    results = arguments.work / "results" / suite.name
    base, experts = (json.loads((results / f"{n}.json").read_text()) for n in ("base", "experts"))
    kept = [task for task in suite.tasks if experts[task] - base[task] >= SMALLEST_GAIN]
    sar: dict[str, dict[str, float]] = {}
    nai: dict[str, dict[str, float]] = {}
    kind = "alignment" if arguments.error == 0.05 else f"alignment-{arguments.error:g}"
    for name in arguments.rows:
        row, file = ROWS[name], results / f"{name}-0.json"
        if not file.is_file():
            continue

        def measure(row: Row = row) -> dict[str, float]:
            used = None
            if row.needs_statistics:
                used = collect_statistics(suite, arguments.work, 0, **row.statistics)
            init = initial_merge(row, results)
            merged = merge_row(suite, row, arguments.work, 0, used, init)
            return alignments(suite, merged, arguments.error)

        found = cached(results / kind / f"{name}.json", measure)
        test = json.loads(file.read_text())["test"]
        sar[name] = {task: found[task] for task in kept}
        nai[name] = {
            task: (test[task] - base[task]) / (experts[task] - base[task]) for task in kept
        }
        print(name, f"SAR {sum(sar[name].values()) / len(kept):.3f}", flush=True)
    outcome = correlate(sar, nai)
    free = {name: values for name, values in sar.items() if not ROWS[name].needs_statistics}
    data_free = correlate(free, nai)
    document = {
        "error": arguments.error,
        "tasks": kept,
        "sar": sar,
        "nai": nai,
        "over_tasks_and_methods": vars(outcome.overall),
        "over_means_of_methods": vars(outcome.means),
        "over_tasks_and_data_free_methods": vars(data_free.overall),
        "over_means_of_data_free_methods": vars(data_free.means),
    }
    (results / f"{kind}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({k: document[k] for k in list(document)[4:]}, indent=1))
    draw(sar, nai, results / f"{kind}.png")


def draw(
    sar: dict[str, dict[str, float]], nai: dict[str, dict[str, float]], file: Path
) -> None:  # fmt: skip
    """One point per method and task, and the methods' means."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours = plt.get_cmap("tab20")
    for index, name in enumerate(sar):
        x, y = list(sar[name].values()), list(nai[name].values())
        axes.scatter(x, y, color=colours(index), s=14, alpha=0.6)
        axes.scatter(
            [sum(x) / len(x)], [sum(y) / len(y)], color=colours(index), s=90, marker="D", label=name
        )
    axes.axhline(0, color="grey", linewidth=0.6)
    axes.set(xlabel="mean subspace alignment ratio", ylabel="normalised accuracy improvement")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, title="diamonds: means")
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
