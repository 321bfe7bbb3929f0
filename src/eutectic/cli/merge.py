"""`eutectic merge`."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from eutectic.cli.console import grid, out, print_json, progress_bar, tell_done, tell_notes, verb
from eutectic.cli.corrections import options_in_faults
from eutectic.cli.options import Json, LimitOptions, RecipeOptions, option
from eutectic.cli.recipe_request import request
from eutectic.cli.report import page_beside, write_page
from eutectic.cli.tune import known_scale
from eutectic.errors import RequestError
from eutectic.recipes.units import format_bytes
from eutectic.sentences import shares
from eutectic.words import between, counted, percent, with_urls

if TYPE_CHECKING:
    from eutectic.execution.run import MergeReport


@verb
def merge(
    *,
    output: Path = option(..., "Folder to write; must not hold anything.", "--output", "-o"),
    asked: RecipeOptions,
    limits: LimitOptions,
    restart: bool = option(False, "Discard an unfinished run instead of continuing it."),
    sweep: str | None = option(
        None,
        "Two experts only: merge with weights λ and 1−λ into OUTPUT/λ for each λ.",
        metavar="λ,λ,… | START:STOP:COUNT",
    ),
    report: bool = option(
        False, "Tell what the merge did on a page beside OUTPUT, OUTPUT.html.", "--report"
    ),
    json: Json = False,
) -> None:
    """Merge experts into one model.

    The work goes on in OUTPUT.partial; a killed run is continued by the same command.

    Examples:

      eutectic merge recipe.yaml -o merged/

      eutectic merge --base ./base -m iso_c --scale 1.3 -o merged/ sst2=./sst2 mnli=./mnli

      eutectic merge --base ./base -m ties -p density=0.2 -o merged/ a=./a b=./b -w a=0.7

      eutectic merge --base ./base -m mats --sweep 0:1:11 -o mixed/ wanted=./a helper=./b

      eutectic merge --base ./base -m iso_c --adapter --rank 32 -o adapter/ a=./lora-a b=./lora-b
    """
    from eutectic.tuning import merge as run

    recipe, options = request(asked)
    options.update(vars(limits), output=output, restart=restart)
    page = page_beside(output) if report else None
    if sweep is not None:
        with options_in_faults(options):
            _sweep(recipe, _mixtures(sweep), options, json)
        write_page(page, output, quiet=json)
        return
    with options_in_faults(options), progress_bar("merging") as tell:
        made = run(recipe, progress=tell, **options)
    _show(made, json)
    write_page(page, made, quiet=json)


def _show(report: "MergeReport", json: bool) -> None:
    if json:
        tell_notes(report.note_records, warnings_only=True)
        print_json(dataclasses.asdict(report))
        return
    table = grid()
    table.add_row("method", f"{_method(report)}, scale {known_scale(report.scale, report.search)}")
    table.add_row("tensors", ", ".join(f"{n} {name}" for name, n in report.tensors.items()))
    table.add_row("merged by", ", ".join(f"{name} {n}" for name, n in report.merged_by.items()))
    table.add_row("shares", shares(report.shares))
    if report.norms.get("ratio") is not None:
        text = f"of all that is merged {report.norms['ratio']:.3g} times the experts' mean"
        table.add_row("change", text)
    for label, text in [*adapter_rows(report.records), *summary(report.records)]:
        table.add_row(label, escape(text))
    resumed = ", continued" if report.resumed else ""
    peak = format_bytes(report.peak_bytes)
    table.add_row("took", f"{report.seconds:.1f} s, peak memory {peak}{resumed}")
    out.print(table)
    tell_notes(report.note_records)
    tell_done("written", report.output)


def _method(report: "MergeReport") -> str:
    """Name the method that merged most numbers, and the one asked for if that is another."""
    after = "" if report.post is None else f" + {report.post}"
    if report.fallback and report.mostly_by != report.method:
        share = percent(1 - report.fallback["share"])
        return f"{report.mostly_by}{after} ({report.method} merges {share} of what it is for)"
    return (
        report.method
        + after
        + ("" if report.method in report.merged_by else " (no tensor takes it)")
    )


def _sweep(recipe: Path | None, weights: list[float], options: dict[str, Any], json: bool) -> None:
    from eutectic.execution.run import mixture_name, sweep
    from eutectic.tuning.entry import choose_scale

    reports = sweep(recipe, mixtures=weights, choose=choose_scale, **options)
    notes = dict.fromkeys(note for report in reports.values() for note in report.note_records)
    tell_notes(notes, warnings_only=True)
    if json:
        print_json({str(value): dataclasses.asdict(report) for value, report in reports.items()})
        return
    for value in weights:
        state = "was finished"
        if value in reports:
            searched = f"  α = {reports[value].scale:g}" if reports[value].search else ""
            state = f"{reports[value].seconds:.1f} s{searched}"
        name = mixture_name(value)
        text = f"λ = {name:<5} {with_urls(str(options['output'] / name))}  {state}"
        out.print(text, highlight=False, soft_wrap=True)


def summary(records: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (label, text) rows: how systems were solved, and what fell short.

    Everything else that methods report, residual curves among it, is in the output's
    `eutectic.json` under `records`.
    """
    found = [
        (tensor if part == "matrix" else f"{tensor}{part}", record)
        for tensor, parts in records.items()
        for part, record in parts.items()
        if isinstance(record, Mapping)  # not a layer's factor: it belongs to no system
    ]
    rows: list[tuple[str, str]] = []
    solved = [(name, record) for name, record in found if "status" in record]
    if solved:
        statuses = Counter(record["status"].replace("_", " ") for _, record in solved)
        listed = ", ".join(f"{count} {status}" for status, count in statuses.most_common())
        steps = sorted(record["iterations"] for _, record in solved)
        rows.append(("systems", f"{len(solved):,} solved by conjugate gradients: {listed}"))
        median = f", median {steps[len(steps) // 2]}" if steps[0] < steps[-1] else ""
        rows.append(("iterations", f"{between(steps[0], steps[-1])}{median}"))
        last = [(name, record["residuals"][-1]) for name, record in solved]
        name, worst = max(last, key=lambda pair: math.inf if pair[1] is None else pair[1])
        shown = "not finite" if worst is None else f"{worst:.1e}"
        rows.append(("worst residual", f"{shown} at {name}"))
    resting = Counter((r["rest"], r["reason"]) for _, r in found if "rest" in r)
    for (rule, reason), count in resting.most_common(3):
        rows.append(("not matched", f"{count} took '{rule}': {reason}"))
    if len(resting) > 3:
        more = counted(len(resting) - 3, "more reason")
        rows.append(("not matched", f"{more}, in eutectic.json"))
    raised = [(record["ridge"], name) for name, record in found if record.get("ridge_escalated")]
    if raised:
        ridge, name = max(raised)
        text = f"{counted(len(raised), 'Gram')} took a ridge, up to {ridge:.1e} at {name}"
        rows.append(("singular", text))
    short = [name for name, record in found if record.get("short")]
    if short:
        text = f"{counted(len(short), 'tensor')} with experts of fewer directions than asked for"
        rows.append(("short", f"{text}, such as {short[0]}"))
    return rows


def adapter_rows(records: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (label, text) rows of an adapter: its ranks, and what was lost of the change."""
    found = {
        name: told
        for name, record in records.items()
        if (told := record.get("adapter")) is not None
    }
    thin = {n: told for n, told in found.items() if "rank" in told and told["changed"]}
    if not found:
        return []
    ranks = sorted(told["rank"] for told in thin.values())
    whole = sum("rank" not in told and told["changed"] for told in found.values())
    text = "no layer changes"
    if thin:
        text = f"{counted(len(thin), 'layer')} of rank {between(ranks[0], ranks[-1])}"
    others = f", {counted(whole, 'other tensor')} changed" if whole else ""
    rows = [("adapter", text + others)]
    after = {n: told["lost_energy"] for n, told in thin.items()}
    before = {n: told["lost_before"] for n, told in thin.items() if "lost_before" in told}
    if before:
        rows.append(("lost energy", f"of the experts' changes: {_spread(before)}"))
    shift = {n: told["lost_shift"] for n, told in thin.items() if "lost_shift" in told}
    if shift:
        rows.append(("lost outputs", f"of the energy that is added to them: {_spread(shift)}"))
    if after and (not before or max(after.values()) > ROUNDING):
        rows.append(("lost energy", f"of the merged change: {_spread(after)}"))
    return rows


def _spread(lost: Mapping[str, float]) -> str:
    worst = max(lost, key=lambda name: lost[name])
    mean = sum(lost.values()) / len(lost)
    if not lost[worst]:
        return "nothing"
    return f"{percent(mean)} on average, {percent(lost[worst])} at most ({worst})"


MOST_MIXTURES = 1_000
ROUNDING = 1e-6  # of the energy: what is merged at a rank has no more directions


def _mixtures(text: str) -> list[float]:
    """Return the values of `0,0.3,1` or `0:1:11` (start, stop, how many)."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        start, stop, count = text.split(":")
        steps = int(count) - 1
        if steps >= MOST_MIXTURES:
            many = f"{steps + 1:,} merges, the limit is {MOST_MIXTURES:,}"
            raise RequestError(f"--sweep '{text}' asks for {many}.")
        low, high = float(start), float(stop)
        return [round(low + (high - low) * i / steps, 6) for i in range(steps + 1)]
    except (ValueError, ZeroDivisionError):
        raise RequestError(
            f"--sweep '{text}' must be numbers with commas, or START:STOP:COUNT such as 0:1:11."
        ) from None
