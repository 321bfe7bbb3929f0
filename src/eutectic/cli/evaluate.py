"""`eutectic evaluate`."""

from __future__ import annotations

import json as encoding
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eutectic.cli.console import out, print_json, print_named, progress_bar, tell, tell_done, verb
from eutectic.cli.named_words import named_paths, pair, unique
from eutectic.cli.options import Json, WhereOptions, argument, option
from eutectic.words import between

if TYPE_CHECKING:
    from eutectic.evaluation.results import Difference, Figures, Results

_PERCENT = {"accuracy", "macro_f1", "exact_match", "acc", "acc_norm"}
_LOWER = " ↓"  # behind metrics of which less is better


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """How checkpoints are measured."""

    split: str = option("test", "proxy, validation or test.")
    batch_size: int = option(64, "Rows per batch.", min=1)
    limit: int | None = option(None, "Score the first rows only.", min=1)
    dtype: str = option("float32", "float32, or bfloat16: autocast, faster, 2-3 digits.")
    routing: str = option("route", "Of routed models: route, oracle (the task's expert) or base.")
    proxy: list[str] | None = option(
        None,
        "Data given to `collect`: must share no row with other splits; repeatable.",
        metavar="TASK=DATA",
    )
    seed: int = option(0, "Of the bootstrap.", min=0)
    resamples: int = option(1000, "Of the bootstrap.", min=0)
    trust_code: bool = option(False, "Allow tasks that run Python code of yours.", "--trust-code")


@dataclass(frozen=True, kw_only=True)
class SpreadMeasureOptions(MeasureOptions, WhereOptions):
    """The same where pairs may be spread over a cluster, and models run on a device."""

    device: str = option(
        "cpu",
        "Where models run; auto: on an accelerator where there is one.",
        metavar="cpu | cuda | cuda:N | mps | auto",
    )


@verb
def evaluate(
    *,
    models: list[str] | None = argument(
        None, "Merged or routed models' folders.", metavar="[NAME=]MODEL…"
    ),
    tasks: Path = option(..., "File of tasks (YAML).", "--tasks", "-t"),
    base: Path | None = option(None, "The base: measured too, and the base of adapters."),
    expert: list[str] | None = option(
        None, "An expert, for its own tasks.", "--expert", "-e", metavar="[NAME=]EXPERT"
    ),
    output: Path | None = option(None, "results.json to write.", "--output", "-o"),
    plot: Path | None = option(
        None, "Draw models with their intervals, and tasks, into a .png, .svg or .pdf file."
    ),
    measures: SpreadMeasureOptions,
    json: Json = False,
) -> None:
    """Measure a base, experts and merged models on tasks, with 95 % bootstrap intervals.

    Each finished pair of checkpoint and task is kept in OUTPUT.outcomes.jsonl; a killed run is
    continued by the same command, and what changed since is measured again.

    Examples:

      eutectic evaluate merged/ --tasks tasks.yaml --base ./base -e sst2=./sst2 -e mnli=./mnli
      -o results.json

      eutectic evaluate iso=merged/ routed/ --tasks tasks.yaml --split validation --limit 500
    """
    from eutectic.evaluation.run import evaluate as run

    if plot is not None:
        from eutectic.reporting.result_plots import check_plot

        check_plot(plot)
    measured: dict[str, Any] = {**vars(measures), "proxy": grouped_proxy(measures.proxy)}
    with progress_bar("evaluating", "reading tasks") as report:
        results = run(
            tasks,
            base=base,
            experts=named_paths(expert or [], "--expert"),
            models=unique(map(_named, models or []), "model"),
            output=output,
            progress=report,
            **measured,
        )
    if plot is not None:
        from eutectic.reporting.result_plots import draw_results

        draw_results(results, plot)
    if json:
        print_json(encoding.loads(results.model_dump_json()))
        return
    show(results)
    tell_done("written", output)
    tell_done("drawn", plot)


def grouped_proxy(words: list[str] | None) -> dict[str, list[str]]:
    """Return task -> its further proxy data."""
    proxy: dict[str, list[str]] = {}
    for name, data in (pair(word, "--proxy") for word in words or []):
        proxy.setdefault(name, []).append(data)
    return proxy


def _named(word: str) -> tuple[str, str]:
    alone = "=" not in word or Path(word).is_dir()  # a folder may be called alpha=0.3
    return (word.rstrip("/"), word) if alone else pair(word, "model")


def show(results: Results) -> None:
    """Print checkpoints as rows: tasks across where few, then means, normalised figures, NAI."""
    rows = [mean.checkpoint for mean in results.means]
    experts = {c.name for c in results.checkpoints if c.role == "expert"}
    cells = {
        ("experts" if r.checkpoint in experts else r.checkpoint, r.task): r for r in results.results
    }
    metrics = {t.metric: t.metric + ("" if t.higher_is_better else _LOWER) for t in results.tasks}
    of_tasks = [
        (
            f"{task.name}\n{metrics[task.metric]}",
            [_value(cells.get((row, task.name)), task.metric) for row in rows],
        )
        for task in results.tasks
    ]
    print_named(rows, [[column] for column in of_tasks])
    out.print()
    unit = 100 if len(metrics) == 1 and _PERCENT.issuperset(metrics) else 1
    means = results.means
    mean_of = f"mean {next(iter(metrics.values()))} [95 %]" if len(metrics) == 1 else "mean [95 %]"
    columns = [
        (mean_of, [_with_interval(m.value, m.interval, unit) for m in means]),
        (
            "of the expert",
            ["–" if m.normalized is None else f"{100 * m.normalized:.1f} %" for m in means],
        ),
    ]
    if any(m.nai is not None for m in means):
        columns.append(("NAI [95 %]", [_with_interval(m.nai, m.nai_interval, 1) for m in means]))
    if len({len(m.tasks) for m in means}) > 1:
        columns.append(("tasks", [str(len(m.tasks)) for m in means]))
    print_named(rows, [[column] for column in columns])
    if any(m.nai is not None for m in means):
        out.print("NAI: 0 is the base, 1 the expert; higher is better", style="dim")
    if any(not task.higher_is_better for task in results.tasks):
        out.print(f"{_LOWER.strip()}: lower is better", style="dim")
    _show_differences(results, unit)
    for note in results.notes:
        tell("note", note)
    sizes = sorted({task.n for task in results.tasks})
    count = between(sizes[0], sizes[-1])
    out.print(f"{', '.join(metrics)}; split {results.split}, n = {count}", style="dim")


def _show_differences(results: Results, unit: int) -> None:
    """Print how far the other models are behind the best one, where there are several."""
    names = {c.name for c in results.checkpoints if c.role == "model"}
    models = [mean for mean in results.means if mean.checkpoint in names]
    sign = 1 if results.tasks[0].higher_is_better else -1
    ranked = {m.checkpoint: m.normalized for m in models if m.normalized is not None}
    if len(ranked) < len(models):
        ranked = {m.checkpoint: sign * m.value for m in models if m.value is not None}
    if len(ranked) < 2:
        return
    best = max(ranked, key=ranked.__getitem__)
    behind = [d for d in results.differences if d.other == best and d.checkpoint in ranked]
    mean = [_with_interval(d.value, d.interval, unit) for d in behind]
    share = [_with_interval(d.normalized, d.normalized_interval, 100) for d in behind]
    columns = [("mean − the best's [95 %]", mean), ("% of expert [95 %]", share)]
    out.print()
    print_named([d.checkpoint for d in behind], [[column] for column in columns])
    alike = [d.checkpoint for d in behind if _holds_zero(d)]
    tell("best", f"{best}; not distinguishable from it: {', '.join(alike)}" if alike else best)


def _holds_zero(found: Difference) -> bool:
    """Tell whether two models may be equally good, by all that the rows say."""
    interval = found.interval if found.normalized_interval is None else found.normalized_interval
    return interval is None or interval[0] <= 0 <= interval[1]


def _value(cell: Figures | None, metric: str) -> str:
    if cell is None or cell.value is None:
        return "–"
    return f"{100 * cell.value:.1f}" if metric in _PERCENT else f"{cell.value:.4g}"


def _with_interval(value: float | None, interval: tuple[float, float] | None, unit: int) -> str:
    if value is None:
        return "–"
    digits = 1 if unit == 100 else 3
    if interval is None:
        return f"{unit * value:.{digits}f}"
    low, high = (f"{unit * v:.{digits}f}" for v in interval)
    return f"{unit * value:.{digits}f} [{low}, {high}]"
