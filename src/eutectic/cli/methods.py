"""`eutectic methods`."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer
from rich.table import Table

from eutectic.cli.console import out, print_json, verb


@verb
def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show one method's page.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """List the methods, or show one method's page.

    Examples:

      eutectic methods

      eutectic methods iso_cts
    """
    from eutectic.methods import get_method
    from eutectic.methods import methods as table_of

    if name is not None:
        get_method(name)
    table = table_of()
    if json:
        print_json(table if name is None else table[name])
        return
    if name is None:
        listing = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("method", "what it does", "needs"):
            listing.add_column(column)
        for key, entry in table.items():
            listing.add_row(key, entry["summary"], ", ".join(entry["needs"]))
        out.print(listing)
        return
    entry = table[name]
    out.print(f"[bold]{name}[/]: {entry['summary']}", highlight=False)
    out.print(f"[dim]{entry['paper']}[/]\n", highlight=False)
    out.print(inspect.cleandoc(entry["description"]), markup=False, highlight=False)
    if entry["parameters"]:
        parameters = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("parameter", "type", "default"):
            parameters.add_column(column)
        for key, value in entry["parameters"].items():
            parameters.add_row(key, str(value["type"]), repr(value["default"]))
        out.print()
        out.print(parameters)
