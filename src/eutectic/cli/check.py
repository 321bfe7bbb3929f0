"""`eutectic check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from eutectic.cli.console import folded, out, print_json, print_named, progress_bar, verb
from eutectic.cli.options import Json, argument, option
from eutectic.errors import EutecticError
from eutectic.words import plain

if TYPE_CHECKING:
    from eutectic.checking import Checked, CheckReport


@verb
def check(
    *,
    folders: list[str] = argument(
        ..., "Checkpoints and adapters: folders, weight files or hub ids.", metavar="FOLDER…"
    ),
    base: str | None = option(
        None,
        "The model that they are fine-tunes of (default: the first full checkpoint of several, "
        "as a guess).",
    ),
    values: bool = option(False, "Read every tensor: NaN, Inf, zeros.", "--values"),
    json: Json = False,
) -> None:
    """Say what is wrong or unusual in checkpoints and adapters, before anyone merges them.

    Reads headers, indices, configurations, tokenizers and adapters. The exit code is 1 where
    anything is wrong, and 0 where things are unusual at most.

    Examples:

      eutectic check ./base ./sst2 ./mnli

      eutectic check ./adapter --base org/model --values
    """
    from eutectic.checking import check as run

    with progress_bar("reading") as bar:
        found = run(*folders, base=base, values=values, progress=bar)
    if json:
        print_json({"sound": found.sound, "checked": [one.as_json() for one in found]})
    else:
        _show(found)
    if not found.sound:
        raise typer.Exit(EutecticError.exit_code)


def _show(found: CheckReport) -> None:
    every = list(found)
    kinds = [f"{one.kind}, {one.model}" if one.model else one.kind for one in every]
    columns = [
        ("kind", kinds),
        ("type", [_dtype(one) for one in every]),
        ("tensors", [f"{one.tensors:,}" for one in every]),
        ("numbers", [_short(one.numbers) for one in every]),
        ("wrong", [_count(one.wrong) for one in every]),
        ("unusual", [_count(one.unusual) for one in every]),
    ]
    groups = [columns[:4], columns[4:]]
    print_named([one.path for one in every], groups, title="checkpoint")
    for one in found:
        if one.wrong or one.unusual or one.remarks:
            out.print()
            out.print(Text(folded(plain(one.path, kept=""), out.width), "bold"))
            out.print(_findings(one), highlight=False)


def _findings(one: Checked) -> Table:
    table = Table(Column(no_wrap=True), Column(overflow="fold"), box=None, show_header=False)
    for label, style, texts in (
        ("wrong", "bold red", one.wrong),
        ("unusual", "bold yellow", one.unusual),
        ("note", "dim", one.remarks),
    ):
        for text in texts:
            table.add_row(f"[{style}]{label}[/]", escape(text))
    return table


def _dtype(one: Checked) -> str:
    floats = [dtype for dtype in one.dtypes if "float" in dtype] or [*one.dtypes]
    return "–" if not floats else floats[0] + (" …" if len(floats) > 1 else "")


def _count(texts: list[str]) -> str:
    return str(len(texts)) if texts else "–"


def _short(count: int) -> str:
    """Return a count to three digits: 6.74 B."""
    value = float(count)
    for unit in ("", " k", " M", " B"):
        if value < 999.5:
            return f"{value:.0f}" if not unit else f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"
