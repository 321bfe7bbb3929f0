"""`eutectic compare`."""

from __future__ import annotations

import json as encoding
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Column

from eutectic.cli.console import (
    err,
    out,
    plain_table,
    print_json,
    print_sentence,
    progress_bar,
    tell,
    tell_done,
    verb,
)
from eutectic.cli.corrections import options_in_faults
from eutectic.cli.evaluate import MeasureOptions, grouped_proxy
from eutectic.cli.named_words import named_paths
from eutectic.cli.options import Json, LimitOptions, SharedRecipeOptions, option
from eutectic.cli.recipe_request import request
from eutectic.cli.tune import parse_range
from eutectic.errors import RequestError
from eutectic.words import between, few

if TYPE_CHECKING:
    from eutectic.comparison import Comparison, Row
    from eutectic.comparison.table import Figure

_TASKS_ACROSS = 5
_UNIT = {"accuracy", "macro_f1", "exact_match", "acc", "acc_norm"}  # shown in per cent


@dataclass(frozen=True, kw_only=True)
class ComparedOptions:
    """What is compared."""

    method: list[str] | None = option(
        None,
        "A method, with parameters after a colon, and +svc or the like after it; repeatable "
        "(default: the usual ones).",
        "--method",
        "-m",
        metavar="NAME[:KEY=VALUE,…]",
    )
    search: list[str] | None = option(
        None,
        "A way to choose α; repeatable (default: default, and the best that the data allow).",
        metavar="default | NUMBER | norm | auto | divergence | validation",
    )
    model: list[str] | None = option(
        None,
        "A model that is there already, a sweep's folder or a routed one; repeatable.",
        metavar="[NAME=]FOLDER",
    )
    range_: str | None = option(
        None, "Range of α of searches over data (default: 0.02:3).", "--range", metavar="LOW:HIGH"
    )
    points: int | None = option(None, "Values on their first grid (default: 11).")
    tolerance: float | None = option(None, "Their relative precision (default: 0.05).")

    def searched(self) -> dict[str, Any]:
        """Return the keys of searches that were given."""
        keys = {"points": self.points, "tolerance": self.tolerance}
        found: dict[str, Any] = {key: value for key, value in keys.items() if value is not None}
        return found | ({} if self.range_ is None else {"range": parse_range(self.range_)})


@verb
def compare(
    *,
    asked: SharedRecipeOptions,
    tasks: Path = option(..., "File of tasks (YAML).", "--tasks", "-t"),
    output: Path = option(..., "Folder for the table and what is known.", "--output", "-o"),
    compared: ComparedOptions,
    best: Path | None = option(None, "Merge the best row's model there, at the end."),
    measures: MeasureOptions,
    limits: LimitOptions,
    json: Json = False,
) -> None:
    """Compare methods, and ways to choose their α, on tasks: one table, differences paired.

    Each method is merged once, whatever α is tried; base and experts are run once. A killed
    comparison is continued by the same command, and a finished one takes up further methods,
    searches and models. Without --method the usual ones are compared: average, task_arithmetic,
    ties, tsv_m, iso_c, iso_cts, and with statistics of every expert regmean, esm, iso_a,
    iso_regmean.

    Examples:

      eutectic compare recipe.yaml --tasks tasks.yaml -o comparison/

      eutectic compare --base ./base a=./a b=./b -t tasks.yaml -o comparison/ -m iso_c
      -m ties:density=0.3 --search default --search 0.5 --search divergence --best merged/
    """
    from eutectic.comparison import compare as run

    recipe, options = request(asked, needed=("base",))
    if "seed" in options:
        raise RequestError(
            "--set seed=… is the seed of merging, and --seed that of the bootstrap: here the first "
            "stands in a recipe."
        )
    options.update(vars(limits), **{k: v for k, v in vars(measures).items() if k != "proxy"})
    if best is not None:
        _check_best(best)
    asked_for = {**options, "scale": compared.searched()}
    with options_in_faults(asked_for, {"scale": "--search"}), progress_bar("comparing") as bar:
        found = run(
            recipe,
            tasks=tasks,
            output=output,
            methods=compared.method,
            searches=compared.search,
            search=compared.searched(),
            models=named_paths(compared.model or [], "--model"),
            proxy=grouped_proxy(measures.proxy),
            progress=bar,
            **options,
        )
    written = None if best is None else _merge_best(found, best, limits)
    if json:
        print_json(
            {**found.as_record(), "results": encoding.loads(found.results.model_dump_json())}
        )
        return
    show(found)
    tell_done("table", output / "comparison.json")
    tell_done("written", written)


def _check_best(folder: Path) -> None:
    from eutectic.execution.output_folder import check_output
    from eutectic.execution.run import work_folder

    check_output(folder, work_folder(folder))


def _merge_best(found: Comparison, folder: Path, limits: LimitOptions) -> Path | None:
    from eutectic.tuning import merge

    recipe = found.recipe()
    if recipe is None:
        err.print(f"[bold yellow]warning: [/]'{found.best}' is no merge: nothing is written.")
        return None
    with progress_bar("merging") as bar:
        # No model runs any more, and matrices are not merged on Apple's GPUs.
        if limits.device.strip().lower() == "mps":
            limits = replace(limits, device="cpu")
        merge(recipe, output=folder, progress=bar, **vars(limits))
    return folder


def show(found: Comparison) -> None:
    """Print the rows by rank, then their tasks, then what is best."""
    shares = all(row.of_experts.value is not None for row in found.rows if row.error is None)
    metrics = {task.metric for task in found.results.tasks}
    unit = 100 if shares or metrics <= _UNIT else 1
    figure = "of experts [95 %]" if shares else f"{' / '.join(sorted(metrics))} [95 %]"
    table = plain_table(
        Column("method", overflow="fold", max_width=24),
        Column("α by", overflow="fold", max_width=12),
        numbers=("α", figure, "behind the best"),
    )
    for row in found.rows:
        value = row.of_experts if shares else row.mean
        name = row.name if row.method is None else row.name.rpartition("@")[0]
        scale = "" if row.scale is None else f"{row.scale:.3g}"
        cells = ["failed", ""] if row.error else [_figure(value, unit), _behind(row, found, unit)]
        style = "bold green" if row.name == found.best else None
        table.add_row(escape(name), row.search or "", scale, *cells, style=style)
    out.print(table)
    _show_tasks(found)
    out.print()
    if found.best:
        level = ", ".join(found.level)
        text = f"; not distinguishable from it: {level}" if level else ", distinguishable from all"
        tell("best", found.best + text)
    for row in found.rows:
        if row.error:
            tell("failed", f"{row.name}: {' '.join(row.error.split())}")
    for name, why in found.left_out.items():
        tell("left out", f"{name}: {why.splitlines()[0]}")
    for text in found.notes:
        tell("note", text)
    told: dict[str, list[str]] = {}
    for row in found.rows:
        for warning in row.warnings:
            told.setdefault(warning, []).append(row.name)
    for warning, names in told.items():
        rows = "every row" if len(names) == len(found.rows) > 1 else few(names)
        print_sentence(f"{rows}: {warning}", "warning:", "bold yellow")
    _show_what_is_shown(found)


def _show_tasks(found: Comparison) -> None:
    """Print the metric of every task, with base and experts above."""
    cells = {(r.checkpoint, r.task): r.value for r in found.results.results}
    experts = {c.name for c in found.results.checkpoints if c.role == "expert"}
    tasks = found.results.tasks
    for start in range(0, len(tasks), _TASKS_ACROSS):
        shown = tasks[start : start + _TASKS_ACROSS]
        table = plain_table(
            Column("", overflow="fold", max_width=32), numbers=[escape(t.name) for t in shown]
        )
        own = [cells.get((t.expert, t.name)) if t.expert in experts else None for t in shown]
        rows = [
            ("base", [cells.get(("base", t.name)) for t in shown]),
            *([("experts", own)] if experts else []),
            *((r.name, [r.tasks.get(t.name) for t in shown]) for r in found.rows if not r.error),
        ]
        for name, values in rows:
            written = (_value(v, t.metric) for v, t in zip(values, shown, strict=True))
            table.add_row(
                escape(name), *written, style="bold green" if name == found.best else None
            )
        out.print()
        out.print(table)


def _show_what_is_shown(found: Comparison) -> None:
    metrics = dict.fromkeys(
        task.metric + ("" if task.higher_is_better else " (lower is better)")
        for task in found.results.tasks
    )
    sizes = sorted({task.n for task in found.results.tasks})
    count = between(sizes[0], sizes[-1])
    text = f"{', '.join(metrics)}; split {found.results.split}, n = {count}"
    out.print(f"{text}; intervals are of 95 %, differences paired", style="dim")


def _figure(figure: Figure, unit: int) -> str:
    if figure.value is None:
        return "–"
    digits, percent = (1, " %") if unit == 100 else (3, "")
    text = f"{unit * figure.value:.{digits}f}{percent}"
    if figure.interval is None:
        return text
    low, high = figure.interval
    return f"{text} \\[{unit * low:.{digits}f}, {unit * high:.{digits}f}]"


def _behind(row: Row, found: Comparison, unit: int) -> str:
    """Return the difference to the best with its interval; ≈ where it may be none."""
    if row.name == found.best:
        return "best"
    if row.behind.value is None or row.behind.interval is None:
        return "–"
    digits = 1 if unit == 100 else 3
    low, high = row.behind.interval
    value, low, high = (_signed(unit * v, digits) for v in (row.behind.value, low, high))
    return f"{value} \\[{low}, {high}]" + ("" if row.distinguishable else " ≈")


def _signed(value: float, digits: int) -> str:
    """Return a number with its sign; what is shown as zero has none."""
    text = f"{value:+.{digits}f}"
    return text if float(text) else f"{0:.{digits}f}"


def _value(value: float | None, metric: str) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if metric in _UNIT else f"{value:.4g}"
