"""Adapters extracted from full fine-tunes: what rank keeps, and what the extraction takes.

    python benchmarks/extraction.py --work DIR --experts DIR/hard [--pairs 3] [--output FILE]

Experts are those of the text suite (`benchmarks/text/experts.py --regime hard`): every encoder
matrix, bias and norm of all-MiniLM-L6-v2 is trained. Accuracy is that of the base with the adapter
on the expert's own task, as a share of the expert's; an error is the paired one over test texts.
Time is that of `eutectic.extract` in a process of its own on one thread, against the same with a
full SVD (torch.linalg.svd in float32) in place of the range finder, in pairs; `--wide` compares the
decomposition alone on one matrix of a language model's size.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "text")]

SETTINGS: dict[str, dict[str, Any]] = {
    **{f"rank {rank}": {"rank": rank} for rank in (4, 8, 16, 32, 64)},
    **{f"energy {share}": {"rank": "auto", "energy": share} for share in (0.9, 0.95, 0.99)},
    "rank 32, others saved": {"rank": 32, "others": "save"},
}
WIDE = (8192, 2048)


def full_svd(matrix: Tensor, *, rank: int, **_: Any) -> Any:
    """Return the leading factors by a full SVD, as one would without a range finder."""
    from eutectic.linalg.range_finder import Compressed

    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()
    kept = float((S[:rank].double() ** 2).sum() / (S.double() ** 2).sum())
    return Compressed(U[:, :rank] * root, root[:, None] * Vh[:rank], 1 - kept)


def run(form: str, base: str, expert: str, rank: int, output: str) -> None:
    """Extract once and print what it took."""
    import eutectic
    from eutectic.execution import adapter_factors
    from eutectic.execution.executors import peak_bytes

    torch.set_num_threads(1)
    if form == "svd":
        adapter_factors.compressed = full_svd
    before = peak_bytes()
    started, used = time.perf_counter(), time.process_time()
    eutectic.extract(expert, base=base, output=output, rank=rank, others="drop", threads=1)
    took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    peak = peak_bytes()
    print(json.dumps(took | {"peak": peak - before, "process_peak": peak}))


def timed(arguments: argparse.Namespace, base: Path, expert: Path) -> list[dict[str, Any]]:
    """Return, for every rank, what both forms of the command and of the decomposition took."""
    rows: list[dict[str, Any]] = []
    for rank in arguments.time_ranks:
        found: dict[str, list[dict[str, float]]] = {"range": [], "svd": []}
        for _ in range(arguments.pairs):
            for form, own in found.items():
                output = arguments.work / "extracted" / form
                shutil.rmtree(output, ignore_errors=True)
                words = ["--one", form, str(base), str(expert), str(rank), str(output)]
                words = [sys.executable, __file__, *words]
                done = subprocess.run(words, check=True, capture_output=True, text=True)
                own.append(json.loads(done.stdout.splitlines()[-1]))
        both = list(zip(found["range"], found["svd"], strict=True))
        ratios = {
            f"{key}_ratio": statistics.median(b[key] / a[key] for a, b in both)
            for key in ("seconds", "cpu_seconds", "process_peak")
        }
        rows.append({"rank": rank, **ratios, **decomposed(changes(base, expert), rank), **found})
        print(rank, {key: round(value, 2) for key, value in ratios.items()}, flush=True)
    return rows


def changes(base: Path, expert: Path) -> list[Tensor]:
    """Return the change of every encoder matrix."""
    one, other = (load_file(folder / "model.safetensors") for folder in (base, expert))
    names = [n for n, own in one.items() if own.ndim == 2 and n.startswith("encoder.")]
    return [other[name] - one[name] for name in names]


def decomposed(matrices: list[Tensor], rank: int, pairs: int = 3) -> dict[str, Any]:
    """Compare the decompositions alone, matrix by matrix in turn."""
    from eutectic.linalg.range_finder import compressed

    def cpu(form: Callable[..., Any], matrix: Tensor) -> tuple[float, float]:
        started = time.process_time()
        lost = form(matrix, rank=rank).lost
        return time.process_time() - started, lost

    ratios: list[float] = []
    total, worst = 0.0, 0.0
    for _ in range(pairs):
        own = [(cpu(compressed, matrix), cpu(full_svd, matrix)) for matrix in matrices]
        ratios.append(sum(svd for _, (svd, _) in own) / sum(a for (a, _), _ in own))
        total = sum(a for (a, _), _ in own)
        worst = max(found / least for (_, found), (_, least) in own if least > 0)
    return {
        "decomposition_ratio": statistics.median(ratios),
        "decomposition_ratio_range": [min(ratios), max(ratios)],
        "decomposition_cpu_seconds": total,
        "largest_lost_over_least": worst,
    }


def wide(rank: int) -> dict[str, Any]:
    """Compare the decompositions of one matrix of `WIDE` whose singular values fall as i^-0.7."""
    generator = torch.Generator().manual_seed(0)
    side = min(WIDE)
    left = torch.linalg.qr(torch.randn(WIDE[0], side, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(WIDE[1], side, generator=generator)).Q
    matrix = (left * torch.arange(1, side + 1) ** -0.7) @ right.mT
    return {"rank": rank, "shape": WIDE, **decomposed([matrix], rank, pairs=1)}


def scored(arguments: argparse.Namespace, tasks: list[str]) -> list[dict[str, Any]]:
    """Return, for every setting, accuracy, rank, lost energy and size over all experts."""
    from suite import load_suite
    from table.outcomes import difference
    from table.run import part_of
    from table.suite import mean, normalised, percentages

    suite = load_suite(arguments.experts.parent, arguments.experts.name, len(tasks))
    tests = {
        task: part_of(own["test"], 0, arguments.test_texts) for task, own in suite.splits.items()
    }
    suite = replace(suite, splits={task: {"test": own} for task, own in tests.items()})

    experts = {task: right(suite, task, suite.experts[task]) for task in suite.tasks}
    zero = {task: torch.zeros_like(own) for task, own in experts.items()}
    base = {task: right(suite, task, suite.base) for task in suite.tasks}
    rows: list[dict[str, Any]] = [
        {"setting": name, "accuracy": mean(percentages(own)), "tests": percentages(own)}
        | {"share": normalised(percentages(own), percentages(experts))}
        | {"error": difference(own, zero, experts)[1]}
        for name, own in (("base", base), ("expert", experts))
    ]
    for name, asked in SETTINGS.items():
        own = {
            task: one(arguments, suite, task, {"others": "drop"} | asked) for task in suite.tasks
        }
        found = {task: torch.tensor(each["right"]) for task, each in own.items()}
        ranks = [rank for each in own.values() for rank in each["ranks"]]
        lost = [share for each in own.values() for share in each["lost"]]
        values = percentages(found)
        rows.append(
            {
                "setting": name,
                "accuracy": mean(values),
                "share": normalised(values, percentages(experts)),
                "error": difference(found, experts, experts)[1],
                "rank": [min(ranks), statistics.fmean(ranks), max(ranks)],
                "energy": [1 - max(lost), 1 - statistics.fmean(lost)],
                "bytes": statistics.fmean(each["bytes"] for each in own.values()),
                "seconds": statistics.fmean(each["seconds"] for each in own.values()),
                "tests": values,
            }
        )
        print(line(rows[-1]), flush=True)
    return rows


def one(arguments: argparse.Namespace, suite: Any, task: str, asked: dict[str, Any]) -> Any:
    """Extract one expert and score it; what was found before is read."""
    import eutectic

    folder = arguments.work / "extracted"
    name = "-".join([task, *(f"{key}{value}" for key, value in sorted(asked.items()))])
    done = folder / f"{name}.json"
    if done.is_file():
        return json.loads(done.read_text())
    adapter, dense = folder / f"{name}.adapter", folder / f"{name}.dense"
    for left in (adapter, dense):
        shutil.rmtree(left, ignore_errors=True)
    report = eutectic.extract(
        suite.experts[task], base=suite.base, output=adapter, threads=1, **asked
    )
    alone = {"base": str(suite.base), "experts": {task: {"path": str(adapter)}}}
    eutectic.merge(alone | {"method": "task_arithmetic", "scale": 1.0}, output=dense, threads=1)
    records = [r["adapter"] for r in report.records.values() if "rank" in r["adapter"]]
    found = {
        "ranks": [record["rank"] for record in records if record["changed"]],
        "lost": [record["lost_energy"] for record in records if record["changed"]],
        "bytes": (adapter / "adapter_model.safetensors").stat().st_size,
        "seconds": report.seconds,
        "right": right(suite, task, dense).tolist(),
    }
    done.write_text(json.dumps(found))
    for left in (adapter, dense):
        shutil.rmtree(left)
    return found


def right(suite: Any, task: str, folder: Path) -> Tensor:
    """Return which test examples of its task a checkpoint gets right."""
    from table.suite import correct

    weights = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in suite.model.named_parameters():
            parameter.copy_(weights[name])
    return correct(suite, suite.model, task, "test")


def line(row: dict[str, Any]) -> str:
    """Return a row of the table as Markdown."""
    low, middle, high = row["rank"]
    worst, kept = row["energy"]
    cells = [row["setting"], f"{row['accuracy']:.1f}", f"{row['share']:.1f} ± {row['error']:.1f}"]
    cells += [f"{middle:.0f} ({low}–{high})", f"{100 * kept:.1f} % ({100 * worst:.1f} %)"]
    return "| " + " | ".join([*cells, f"{row['bytes'] / 1e6:.2f} MB"]) + " |"


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of what it makes")
    parser.add_argument("--experts", type=Path, help="DIR/hard of the text suite")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--test-texts", type=int, default=500, help="of every task, at most")
    parser.add_argument("--time-ranks", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--wide", type=int, nargs="*", default=[], help="ranks of the wide matrix")
    parser.add_argument("--no-accuracy", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file of the results, added to")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        form, base, expert, rank, output = arguments.one
        run(form, base, expert, int(rank), output)
        return
    torch.set_num_threads(1)
    from experts import BASE
    from sources import first_tasks

    tasks = list(first_tasks(arguments.tasks))
    found: dict[str, Any] = {}
    if arguments.time_ranks:
        found["time"] = timed(arguments, BASE, arguments.experts / tasks[0])
    if arguments.wide:
        found["wide"] = [wide(rank) for rank in arguments.wide]
    if not arguments.no_accuracy:
        found["accuracy"] = scored(arguments, tasks)
    if arguments.output:
        known = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
        arguments.output.write_text(json.dumps(known | found, indent=1) + "\n")
    else:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
