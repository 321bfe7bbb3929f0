"""`eutectic merge`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from eutectic.cli import request as words
from eutectic.cli.console import out, print_json, progress_bar, tell_done, tell_notes, verb
from eutectic.cli.outcomes import summary
from eutectic.recipes.units import format_bytes


@verb
def merge(
    what: words.What = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; must not hold anything.")
    ] = ...,  # type: ignore[assignment]
    base: words.Base = None,
    method: words.MethodName = None,
    scale: words.Scale = None,
    param: words.Parameter = None,
    weight: words.Weight = None,
    statistics: words.StatisticsFile = None,
    set_: words.Set = None,
    threads: words.Threads = None,
    memory: words.Memory = None,
    restart: Annotated[
        bool, typer.Option(help="Discard an unfinished run instead of continuing it.")
    ] = False,
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="λ,λ,… | START:STOP:COUNT",
            help="Two experts only: merge with weights λ and 1−λ into OUTPUT/λ for each λ.",
        ),
    ] = None,
    json: words.Json = False,
) -> None:
    """Merge experts into one model.

    The work goes on in OUTPUT.partial; a killed run is continued by the same command.

    Examples:

      eutectic merge recipe.yaml -o merged/

      eutectic merge --base ./base -m iso_c --scale 1.3 -o merged/ sst2=./sst2 mnli=./mnli

      eutectic merge --base ./base -m ties -p density=0.2 -o merged/ a=./a b=./b -w a=0.7

      eutectic merge --base ./base -m mats --sweep 0:1:11 -o mixed/ wanted=./a helper=./b
    """
    from eutectic.tuning import merge as run

    recipe, options = words.request(what, base, method, scale, param, weight, statistics, set_)
    if sweep is not None:
        _sweep(recipe, output, words.mixtures(sweep), threads, memory, restart, options, json)
        return
    with progress_bar("merging") as tell:
        report = run(
            recipe,
            output=output,
            threads=threads,
            memory=memory,
            restart=restart,
            progress=tell,
            **options,
        )
    if json:
        tell_notes(report.notes, warnings_only=True)
        print_json(dataclasses.asdict(report))
        return
    table = Table.grid(padding=(0, 2))
    table.add_row("method", f"{report.method}, scale {report.scale:g}")
    table.add_row("tensors", ", ".join(f"{n} {name}" for name, n in report.tensors.items()))
    table.add_row("merged by", ", ".join(f"{name} {n}" for name, n in report.merged_by.items()))
    for label, text in summary(report.records):
        table.add_row(label, escape(text))
    resumed = ", continued" if report.resumed else ""
    table.add_row(
        "took", f"{report.seconds:.1f} s, peak memory {format_bytes(report.peak_bytes)}{resumed}"
    )
    out.print(table)
    tell_notes(report.notes)
    tell_done("written", report.output)


def _sweep(
    recipe: Path | None,
    output: Path,
    mixtures: list[float],
    threads: int | None,
    memory: str | None,
    restart: bool,
    options: dict[str, Any],
    json: bool,
) -> None:
    from eutectic.execution.sweep import mixture_name, sweep

    reports = sweep(
        recipe,
        output=output,
        mixtures=mixtures,
        threads=threads,
        memory=memory,
        restart=restart,
        **options,
    )
    notes = dict.fromkeys(note for report in reports.values() for note in report.notes)
    tell_notes(notes, warnings_only=True)
    if json:
        print_json({str(value): dataclasses.asdict(report) for value, report in reports.items()})
        return
    for value in mixtures:
        state = f"{reports[value].seconds:.1f} s" if value in reports else "was finished"
        name = mixture_name(value)
        out.print(f"λ = {name:<5} {output / name}  {state}", highlight=False, soft_wrap=True)
