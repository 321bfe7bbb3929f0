"""What all verbs share: errors in a few lines, progress with ETA, answers as tables or JSON."""

import codecs
import dataclasses
import functools
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Signature
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
from rich.text import Text

from eutectic.cli.options import call_with_records, parameters_of
from eutectic.errors import EutecticError, Note, why_failed
from eutectic.words import is_plain, plain


class _PlainConsole(Console):
    """A console on which texts appear and do nothing else: names in files may hold anything."""

    def render_str(self, text: str, **options: Any) -> Text:  # pyright: ignore
        """Make a text for the terminal, with the escape sequences in it written out."""
        return super().render_str(plain(text, kept="\n\t"), **options)


out = _PlainConsole()
err = _PlainConsole(stderr=True)

INTERRUPTED = 130
_NO_MEMORY = re.compile(r"(can't|cannot) allocate|not enough memory|out of memory", re.I)
_Command = TypeVar("_Command", bound=Callable[..., Any])
settings = {"debug": False}  # whether tracebacks of expected errors are shown


def verb(command: _Command) -> _Command:
    """Make a command for typer: its records are options, its errors lines and an exit code."""

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        try:
            return call_with_records(command, values)
        except (EutecticError, OSError) as error:
            if settings["debug"]:
                raise
            if isinstance(error, EutecticError):
                code = error.exit_code
                text = "\n".join(str(error).splitlines()) or type(error).__name__
            else:
                code = EutecticError.exit_code
                where = "" if error.filename is None else f"{error.filename}: "
                text = f"{where}{why_failed(error)}."
            err.print("[bold red]error:[/] ", end="")
            err.print(text, markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(code) from None
        except (MemoryError, RuntimeError) as error:
            if settings["debug"] or not _is_out_of_memory(error):
                raise
            first = (str(error).splitlines() or [""])[0]
            err.print("[bold red]error:[/] the memory does not suffice.", highlight=False)
            err.print(first, markup=False, highlight=False, soft_wrap=True)
            err.print("Allow less with --memory, or fewer --threads, where the verb has them.")
            raise typer.Exit(EutecticError.exit_code) from None
        except KeyboardInterrupt:
            err.print("interrupted; the same command continues where it stopped.")
            raise typer.Exit(INTERRUPTED) from None

    parameters = list(parameters_of(command))
    described: Any = run
    described.__signature__ = Signature(parameters)
    described.__annotations__ = {p.name: p.annotation for p in parameters}
    return described


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory was refused; torch says so in the text of a RuntimeError."""
    return isinstance(error, MemoryError) or bool(_NO_MEMORY.search(str(error)))


def escape_what_cannot_be_printed() -> None:
    """Let terminals and files that cannot take a letter have its number, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _only_ascii() -> bool:
    """Tell whether JSON on stdout needs its own escapes, which a number alone is not."""
    return codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"


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
            bar.update(
                task, completed=done, total=total, current=escape(plain(current[-40:], kept=""))
            )

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


def notes_as_json(notes: Sequence[Note]) -> dict[str, Any]:
    """Return notes as texts, and their records for programs."""
    records = [dataclasses.asdict(note) for note in notes]
    return {"notes": [str(note) for note in notes], "note_records": records}


def tell_done(label: str, path: object | None) -> None:
    """Print what was made, if anything was, on one line however long."""
    if path is not None:
        out.print(f"[bold green]{label}[/] {escape(str(path))}", highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout, for machines."""

    def as_json(part: Any) -> Any:
        return dict(part) if isinstance(part, Mapping) else str(part)

    text = json.dumps(value, indent=1, ensure_ascii=False, default=as_json)
    # JSON leaves some control characters as they are.
    if _only_ascii() or not all(map(is_plain, text.split("\n"))):
        text = json.dumps(value, indent=1, default=as_json)
    sys.stdout.write(text + "\n")
