"""`eutectic methods`."""

import inspect
import json as encoding
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from rich.markup import escape

from eutectic.cli.console import out, plain_table, print_json, verb
from eutectic.cli.options import Json, argument

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


@verb
def methods(
    name: str | None = argument(None, "Show one method's page.", show_default=False),
    json: Json = False,
) -> None:
    """List the methods, or show one method's page.

    Examples:

      eutectic methods

      eutectic methods iso_cts
    """
    from eutectic.methods import all_posts, get_method
    from eutectic.methods import methods as table_of
    from eutectic.methods.matrices import post_processors

    table, after = table_of(), post_processors()
    if name is not None and name in after:
        _show(name, after[name], all_posts()[name].parameters, json)
        return
    if name is not None:
        get_method(name)
    if name is None and json:
        print_json(table)
        return
    if name is None:
        listing = plain_table("method", "what it does", "needs")
        for key, entry in table.items():
            listing.add_row(key, entry["summary"], ", ".join(entry["needs"]))
        out.print(listing)
        steps = plain_table("--post", "what follows any method", "needs")
        for key, entry in after.items():
            steps.add_row(key, entry["summary"], ", ".join(entry["needs"]))
        out.print()
        out.print(steps)
        out.print(
            "\nneeds: statistics of every expert, which `eutectic collect` makes. "
            "One method's page: `eutectic methods NAME`.",
            style="dim",
        )
        return
    _show(name, table[name], get_method(name).parameters, json)


def _show(name: str, entry: Mapping[str, Any], kind: type, json: bool) -> None:
    """Show the page of a method, or of what follows one."""
    if json:
        print_json(dict(entry))
        return
    out.print(f"[bold]{name}[/]: {entry['summary']}", highlight=False)
    out.print(f"[dim]{entry['paper']}[/]\n", highlight=False)
    out.print(inspect.cleandoc(entry["description"]), markup=False, highlight=False)
    if entry["parameters"]:
        hints, meanings = get_type_hints(kind, include_extras=True), _meanings(kind)
        parameters = plain_table("parameter", "type", "default", "meaning")
        for key, value in entry["parameters"].items():
            default = encoding.dumps(value["default"]).strip('"')
            words = (_type(hints[key]), default, meanings.get(key, ""))
            parameters.add_row(key, *map(escape, words))
        out.print()
        out.print(parameters)


def _type(hint: Any) -> str:
    """Return a type in words: `float ≥ 0, ≤ 1`, `mean | sum`."""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        bounds = [
            f"{sign} {getattr(mark, name)}"
            for mark in marks
            for name, sign in _BOUNDS.items()
            if hasattr(mark, name)
        ]
        return " ".join([_type(inner), ", ".join(bounds)])
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_args(hint):
        return " | ".join(map(_type, get_args(hint)))
    return "null" if hint is type(None) else hint.__name__


def _meanings(kind: type) -> dict[str, str]:
    """Return parameter -> its line under `Attributes:` in the class's docstring."""
    _, _, attributes = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
