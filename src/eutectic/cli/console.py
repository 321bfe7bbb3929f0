"""What all verbs share: errors in a few lines, progress with ETA, answers as tables or JSON."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Signature
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from eutectic.cli.options import call_with_records, parameters_of
from eutectic.errors import EutecticError, Note, RequestError

out = Console()
err = Console(stderr=True)

INTERRUPTED = 130
_Command = TypeVar("_Command", bound=Callable[..., Any])
_settings = {"debug": False}


def set_debug(debug: bool) -> None:
    """Show tracebacks of expected errors too."""
    _settings["debug"] = debug


def verb(command: _Command) -> _Command:
    """Make a command for typer: its records are options, its errors lines and an exit code.

    Errors raised on purpose become two or three lines on stderr.
    """

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        try:
            return call_with_records(command, values)
        except EutecticError as error:
            if _settings["debug"]:
                raise
            first, *rest = str(error).splitlines() or [type(error).__name__]
            err.print("[bold red]error:[/] ", end="")
            err.print(first, markup=False, highlight=False, soft_wrap=True)
            for line in rest:
                err.print(line, markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            if _settings["debug"]:
                raise
            err.print("[bold red]error:[/] ", end="")
            where = "" if error.filename is None else f"{error.filename}: "
            err.print(f"{where}{error.strerror or error}.", markup=False, soft_wrap=True)
            raise typer.Exit(EutecticError.exit_code) from None
        except KeyboardInterrupt:
            err.print("interrupted; the same command continues where it stopped.")
            raise typer.Exit(INTERRUPTED) from None

    parameters = list(parameters_of(command))
    described: Any = run
    described.__signature__ = Signature(parameters)
    described.__annotations__ = {p.name: p.annotation for p in parameters}
    return described


def pairs(items: list[str], what: str) -> dict[str, str]:
    """Return name -> value of `name=value` words.

    Raises:
        RequestError: a word has no `=`, or a name stands twice.
    """
    return unique((pair(item, what) for item in items), what)


def pair(item: str, what: str) -> tuple[str, str]:
    """Return name and value of a `name=value` word.

    Raises:
        RequestError: it has no `=`, no name or no value.
    """
    name, separator, value = item.partition("=")
    if not separator or not name or not value:
        raise RequestError(f"{what} '{item}' must have the form name=value.")
    return name, value


def unique(named: Iterable[tuple[str, str]], what: str) -> dict[str, str]:
    """Return name -> value.

    Raises:
        RequestError: a name stands twice.
    """
    found: dict[str, str] = {}
    for name, value in named:
        if name in found:
            raise RequestError(f"{what} '{name}' is given twice.")
        found[name] = value
    return found


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float, float, str], None]]:
    """Show a bar with ETA on stderr while the block runs, if a person is watching."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[current]}", justify="left"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=None, current="")

        def tell(done: float, total: float, current: str) -> None:
            bar.update(task, completed=done, total=total, current=escape(current[-40:]))

        yield tell


def plain_table(*headers: Column | str, numbers: Iterable[str] = ()) -> Table:
    """Return a table without lines; columns of `numbers` follow, aligned on the right."""
    right = (Column(name, justify="right") for name in numbers)
    return Table(*headers, *right, box=None, pad_edge=False, header_style="bold")


def tell(label: str, text: object) -> None:
    """Print a remark under a dim label; brackets in it are no markup."""
    out.print(f"[dim]{label}[/] {escape(str(text))}", highlight=False)


def tell_notes(notes: Iterable[Note], *, warnings_only: bool = False) -> None:
    """Print a plan's notes as remarks, and warnings among them on stderr."""
    for note in notes:
        if note.level == "warning":
            err.print("[bold yellow]warning: [/]", end="")
            err.print(note.text, markup=False, highlight=False, soft_wrap=True)
        elif not warnings_only:
            tell("note", note)


def notes_as_json(notes: Iterable[Note]) -> dict[str, Any]:
    """Return notes as texts, and their records for programs."""
    noted = list(notes)
    records = [dataclasses.asdict(note) for note in noted]
    return {"notes": [str(note) for note in noted], "note_records": records}


def tell_done(label: str, path: object) -> None:
    """Print what was made, on one line however long."""
    out.print(f"[bold green]{label}[/] {escape(str(path))}", highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout, for machines."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    return str(value)
