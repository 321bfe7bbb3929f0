"""`eutectic tune`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eutectic.cli.console import (
    notes_as_json,
    out,
    print_json,
    print_named,
    progress_bar,
    tell,
    tell_done,
    tell_notes,
    verb,
)
from eutectic.cli.corrections import options_in_faults
from eutectic.cli.options import Json, LimitOptions, SearchedRecipeOptions, option
from eutectic.cli.recipe_request import request
from eutectic.errors import RequestError

BAR = 16
DEFAULT_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The keys of `scale: {…}` that are given on the command line."""

    search: str | None = option(
        None,
        "What to optimise (default: what the recipe says).",
        metavar="validation | divergence | gram (or auto) | norm",
    )
    tasks: Path | None = option(None, "Tasks (YAML) with validation or proxy data.")
    range_: str | None = option(
        None, "Range of α (default: 0.02:3).", "--range", metavar="LOW:HIGH"
    )
    points: int | None = option(None, "Values on the first grid (default: 11).")
    tolerance: float | None = option(None, "Relative precision (default: 0.05).")
    over: str | None = option(
        None,
        "Search a parameter of the method instead of α, such as tau of flow; every value is "
        "merged anew.",
        metavar="PARAMETER",
    )
    at: float | None = option(None, "With --over: α of every merge (default: the method's).")

    def stated(self) -> dict[str, Any]:
        """Return the keys that were given, as a recipe would have them."""
        keys = {key.rstrip("_"): value for key, value in vars(self).items() if value is not None}
        keys = {key: value for key, value in keys.items() if key not in ("over", "at")}
        for key, plain in (("tasks", str), ("range", parse_range)):
            if key in keys:
                keys[key] = plain(keys[key])
        if keys.get("search") == "auto":  # as in a recipe's `scale: auto`
            idle = ", ".join(f"--{key}" for key in keys if key != "search")
            if idle and self.over is None:
                raise RequestError(
                    f"--search auto is a closed form and takes no {idle}.\n"
                    "Leave it out, or choose --search divergence or validation, with --tasks."
                )
            keys["search"] = "gram"
        return keys


@verb
def tune(
    *,
    search: SearchOptions,
    output: Path | None = option(None, "Write the model at the best α there.", "--output", "-o"),
    work: Path | None = option(None, "Keep deltas and measurements there, for further searches."),
    plot: Path | None = option(
        None,
        "Draw the curve into a .png, .svg or .pdf file, with its numbers in a .json beside it.",
    ),
    asked: SearchedRecipeOptions,
    limits: LimitOptions,
    restart: bool = option(False, "Discard an unfinished run, or what --work keeps."),
    json: Json = False,
) -> None:
    """Search the scale α of a merge, or a parameter of its method, and show the curve.

    The experts are merged once; every α is tried in one loaded model. `validation` uses labels,
    `divergence` unlabelled proxy data, `gram` statistics only: it is a closed form and runs no
    model. Test data are never touched.

    Examples:

      eutectic tune recipe.yaml --search divergence --tasks tasks.yaml

      eutectic tune recipe.yaml --search validation --tasks tasks.yaml -o merged/ --plot curve.png

      eutectic tune --base ./base -m iso_c --search gram a=./a b=./b -s a=a.stats -s b=b.stats

      eutectic tune flow.yaml --over tau --range 0.05:50 --search divergence --tasks tasks.yaml
    """
    from eutectic.tuning import tune as run
    from eutectic.tuning.search import check_plot, numbers_of, plot_curve

    recipe, options = request(asked)
    options.update(vars(limits), search=search.stated(), output=output, work=work, restart=restart)
    options.update(over=search.over, at=search.at)
    if plot is not None:
        check_plot(plot)
    asked_for = {**options, "scale": search.stated()}
    named = {"scale": "--search"}
    with options_in_faults(asked_for, named), progress_bar("tuning") as bar:
        report = run(recipe, progress=bar, **options)
    record: dict[str, Any] = {
        "method": report.method,
        "scale": report.scale,
        "over": report.over,
        "output": None if output is None else str(output),
        **notes_as_json(report.note_records),
        **report.search,
    }
    if plot is not None:
        plot_curve(record, plot)
    if json:
        tell_notes(report.note_records, warnings_only=True)
        print_json(record)
        return
    show_curve(report.search)
    better = "higher" if report.search.get("maximise") else "lower"
    tell("objective", f"{report.search['objective']}; {better} is better")
    tell_notes(report.note_records)
    known = known_scale(report.scale, report.search)
    best = report.scale
    if report.over is None:
        out.print(f"[bold green]α = {known}[/] for {report.method}", highlight=False)
    else:
        assert report.value is not None
        best, known = report.value, known_scale(report.value, report.search)
        after = f"of {report.method} at scale {report.scale:g}"
        out.print(f"[bold green]{report.over} = {known}[/] {after}", highlight=False)
    if known != f"{best:g}":
        tell("exactly", f"{best:g}, which gives the same bytes again")
    tell_done("written", output)
    tell_done("drawn", plot)
    tell_done("numbers", None if plot is None else numbers_of(plot))


def known_scale(scale: float, search: Mapping[str, Any] | None) -> str:
    """Return α to the digits that a search knows, at least two: two of 5 %."""
    if not search:
        return f"{scale:g}"
    digits = max(2, math.ceil(-math.log10(search.get("tolerance") or DEFAULT_TOLERANCE)))
    return f"{scale:.{digits}g}"


def show_curve(search: Mapping[str, Any]) -> None:
    """Print the curve with one bar per α, and what the objective consists of.

    Bars show where values lie between the smallest and the largest of those near the best one: a
    bad α at the edge of the range must not make the others look alike. « and » lie outside.
    """
    from eutectic.tuning.search import chosen, near_the_best, tried

    points, scales, best = search["points"], tried(search), chosen(search)
    curve = [math.nan if p["value"] is None else float(p["value"]) for p in points]
    low, high = near_the_best([curve], scales.index(best)) or (-math.inf, math.inf)
    inside = [value for value in curve if low <= value <= high]
    first, last = (min(inside), max(inside)) if inside else (0.0, 0.0)

    def bar(value: float) -> str:
        if math.isnan(value):
            return "░" * BAR
        if not low <= value <= high:
            return "«" + "░" * (BAR - 1) if value < low else "█" * (BAR - 1) + "»"
        length = 1 + round((BAR - 1) * (value - first) / ((last - first) or 1.0))
        return "█" * length + "░" * (BAR - length)

    marks = [" ◀" if scale == best else "" for scale in scales]
    values = [f"{_shown(p['value'])} {bar(own)}" for p, own in zip(points, curve, strict=True)]
    direction = "↑" if search.get("maximise") else "↓"
    columns = [(f"objective {direction}", values)]
    columns += [
        (name, [_shown(p["parts"].get(name)) for p in points]) for name in points[0]["parts"]
    ]
    styles = ["bold green" if mark else None for mark in marks]
    names = [f"{scale:.3g}{mark}" for scale, mark in zip(scales, marks, strict=True)]
    title = search.get("over") or "α"
    print_named(names, [[column] for column in columns], title=title, styles=styles)
    if first < last:
        outside = "; « and » lie outside" if len(inside) < len(curve) else ""
        out.print(f"bars from {first:.4g} to {last:.4g}{outside}", style="dim", highlight=False)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def parse_range(text: str) -> list[float]:
    """Return both ends of `LOW:HIGH`."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise RequestError(f"--range '{text}' must be LOW:HIGH such as 0.02:3.") from None
    return [low, high]
