"""What all verbs share: errors in a few lines, progress with ETA, answers as tables or JSON."""

import codecs
import dataclasses
import functools
import gc
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Signature
from typing import Any, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
)
from rich.table import Column, Table
from rich.text import Text

from eutectic.cli.corrections import with_options
from eutectic.cli.options import call_with_records, parameters_of
from eutectic.cli.waiting import Waiting
from eutectic.errors import EutecticError, Note, why_failed
from eutectic.words import is_plain, plain, with_urls


class _PlainConsole(Console):
    """A console on which texts appear and do nothing else: names in files may hold anything."""

    def render_str(self, text: str, **options: Any) -> Text:  # pyright: ignore
        """Make a text for the terminal, with the escape sequences in it written out."""
        return super().render_str(plain(text, kept="\n\t"), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print on a line of its own, whatever said so far what is being done."""
        waiting.interrupt()
        super().print(*objects, **options)


_terminal = Console(stderr=True)  # knows nothing of what waits
out = _PlainConsole()
err = _PlainConsole(stderr=True)
waiting = Waiting(_terminal)


def doing(text: str) -> None:
    """Say what is done now, if it takes longer than a second; see `Waiting`. Imports are over."""
    begin_work()
    waiting.say(text)


def begin_work() -> None:
    """Put Python's collector on again, after imports; what they made it need not look at."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


INTERRUPTED = 130
_NO_MEMORY = re.compile(r"(can't|cannot) allocate|not enough memory|out of memory", re.I)
_Command = TypeVar("_Command", bound=Callable[..., Any])
settings = {"debug": False}  # whether tracebacks of expected errors are shown


def verb(command: _Command) -> _Command:
    """Make a command for typer: its records are options, its errors lines and an exit code."""

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        waiting.say("loading libraries")
        try:
            return call_with_records(command, values)
        except (EutecticError, OSError) as error:
            if settings["debug"]:
                raise
            if isinstance(error, EutecticError):
                code = error.exit_code
                text = "\n".join(str(error).splitlines()) or type(error).__name__
                text = with_options(text)
            else:
                code = EutecticError.exit_code
                where = "" if error.filename is None else f"{error.filename}: "
                text = f"{where}{why_failed(error)}."
            print_sentence(text, "error:", "bold red")
            raise typer.Exit(code) from None
        except (MemoryError, RuntimeError) as error:
            if settings["debug"] or not _is_out_of_memory(error):
                raise
            first = (str(error).splitlines() or [""])[0]
            err.print("[bold red]error:[/] the memory does not suffice.", highlight=False)
            print_sentence(first)
            err.print("Allow less with --memory, or fewer --threads, where the verb has them.")
            raise typer.Exit(EutecticError.exit_code) from None
        except KeyboardInterrupt:
            err.print("interrupted; the same command continues where it stopped.")
            raise typer.Exit(INTERRUPTED) from None
        finally:
            doing("")

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


# What libraries print unasked: deprecations, advice, reports of loading, bars of their own.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
_LIBRARIES = r"(transformers|peft|torch|datasets|huggingface_hub|tokenizers|accelerate|PIL)(\.|$)"


def silence_libraries() -> None:
    """Keep libraries from printing among our lines; what the user has set for them wins."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for kind in (UserWarning, DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=kind, module=_LIBRARIES)


def _only_ascii() -> bool:
    """Tell whether JSON on stdout needs its own escapes, which a number alone is not."""
    return codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"


class _Times(ProgressColumn):
    """How long it took so far, and how long it will take, each with its name."""

    def render(self, task: Task) -> Text:
        """Return both, or the former alone where nobody knows the latter."""
        left = None if task.finished else task.time_remaining
        shown = f"{_clock(task.elapsed or 0)} elapsed"
        return Text(shown if left is None else f"{shown}, {_clock(left)} left")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


_BAR = 12
_BESIDE = 40  # columns of a line of progress besides its title and what is being done


@contextmanager
def progress_bar(
    title: str, first: str = "reading headers"
) -> Iterator[Callable[[float, float, str], None]]:
    """Show a bar with times on stderr while the block runs, if a person is watching.

    `first` is what is being done until the block tells more.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=_BAR),
        TaskProgressColumn(),
        _Times(),
        TextColumn(
            "[dim]{task.fields[current]}", justify="left", table_column=Column(no_wrap=True)
        ),
    )

    def fitting(text: str) -> str:
        room = max(err.width - len(title) - _BAR - _BESIDE, 8)
        text = plain(text, kept="")
        return escape(text if len(text) <= room else "…" + text[1 - room :])

    begin_work()
    bar = Progress(*columns, console=_terminal, transient=True, disable=not err.is_terminal)
    with waiting.held(), bar:
        task = bar.add_task(title, total=None, current=fitting(first))

        def tell(done: float, total: float, current: str) -> None:
            bar.update(task, completed=done, total=total, current=fitting(current))

        yield tell


_BREAKS = re.compile(r"(?<=[./])(?=[^./])")
_BREAKS_INSIDE = re.compile(r"(?<=[_-])(?=[^_-])")


def folded(name: str, room: int) -> str:
    """Return a name in lines of at most `room` letters, broken after dots, slashes and the like.

    Nothing of it is left out, so that two names never look alike.

    >>> print(folded("text_model.encoder.layers.0.fc1", 20))
    text_model.encoder.
      layers.0.fc1
    """
    room = max(room, 8)
    lines, line = [""], 0
    parts = _BREAKS.split(name)
    longest = room - 2
    split = ([p] if len(p) <= longest else _BREAKS_INSIDE.split(p) for p in parts)
    for part in (one for several in split for one in several):
        while part:
            free = room - len(lines[line]) - (2 if line and not lines[line] else 0)
            if len(part) > free and lines[line].strip():
                lines.append("  ")
                line += 1
                continue
            lines[line] += part[: max(free, 1)]
            part = part[max(free, 1) :]
            if part:
                lines.append("  ")
                line += 1
    return "\n".join(lines)


Cells = tuple[str, Sequence[str]]  # a column: its header, and a cell for each name


def print_named(
    names: Sequence[str],
    groups: Sequence[Sequence[Cells]],
    *,
    title: str = "",
    styles: Sequence[str | None] = (),
    left: bool = False,
) -> None:
    """Print a table with a name in front of each row, in several where the terminal is narrow.

    Names are folded, never cut; cells stay on their lines. Columns of a group stay together. They
    are aligned on the right, unless `left`.
    """
    styles = styles or [None] * len(names)
    waiting_groups = list(groups)
    wide = max(map(cell_len, [*names, title]), default=0)
    while waiting_groups:
        shown = [waiting_groups.pop(0)]
        used = sum(map(_width, shown[0]))
        while waiting_groups:
            more = sum(map(_width, waiting_groups[0]))
            if min(wide, _LEAST) + used + more > out.width:
                break
            shown.append(waiting_groups.pop(0))
            used += more
        columns = [column for group in shown for column in group]
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(title, no_wrap=True)
        fits = used + min(wide, _LEAST) <= out.width
        for header, _ in columns:
            justify = "left" if left else "right"
            table.add_column(Text(header, justify=justify), justify=justify, no_wrap=fits)
        for i, name in enumerate(names):
            first = Text(folded(plain(name, kept=""), max(out.width - used, _LEAST)))
            table.add_row(first, *(Text(cells[i]) for _, cells in columns), style=styles[i])
        out.print(table)
        if waiting_groups:
            out.print()


_LEAST = 24  # columns that names get at least, if they need them


def _width(column: Cells) -> int:
    header, cells = column
    return 2 + max(cell_len(line) for text in (header, *cells) for line in text.split("\n"))


def plain_table(*headers: Column | str, numbers: Iterable[str] = ()) -> Table:
    """Return a table without lines; columns of `numbers` follow, aligned on the right."""
    right = (Column(name, justify="right") for name in numbers)
    return Table(*headers, *right, box=None, pad_edge=False, header_style="bold")


def grid() -> Table:
    """Return a table of labels and what they say, both whole however narrow the terminal is."""
    labels = Column(overflow="fold", max_width=_LEAST)
    return Table.grid(labels, Column(overflow="fold"), padding=(0, 2))


def tell(label: str, text: object) -> None:
    """Print a remark under a dim label; brackets in it are no markup."""
    out.print(f"[dim]{label}[/] {escape(str(text))}", highlight=False)


def print_sentence(text: str, label: str = "", style: str = "") -> None:
    """Print a sentence on stderr: on a terminal wrapped between words, elsewhere on its line.

    A `label` such as "warning:" stands before it, in a style of its own.
    """
    whole = Text.assemble((f"{label} ", style) if label else "", plain(text, kept="\n\t"))
    err.print(whole, highlight=False, soft_wrap=not err.is_terminal)


def tell_notes(notes: Iterable[Note], *, warnings_only: bool = False) -> None:
    """Print a plan's notes as remarks, and warnings among them on stderr."""
    for note in notes:
        if note.level == "warning":
            print_sentence(note.text, "warning:", "bold yellow")
        elif not warnings_only:
            tell("note", note)


def notes_as_json(notes: Sequence[Note]) -> dict[str, Any]:
    """Return notes as texts, and their records for programs."""
    records = [dataclasses.asdict(note) for note in notes]
    return {"notes": [str(note) for note in notes], "note_records": records}


def tell_done(label: str, path: object | None) -> None:
    """Print what was made, if anything was, on one line however long."""
    if path is not None:
        out.print(
            f"[bold green]{label}[/] {escape(with_urls(str(path)))}",
            highlight=False,
            soft_wrap=True,
        )


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout, for machines."""

    def as_json(part: Any) -> Any:
        return dict(part) if isinstance(part, Mapping) else with_urls(str(part))

    text = json.dumps(value, indent=1, ensure_ascii=False, default=as_json)
    # JSON leaves some control characters as they are.
    if _only_ascii() or not all(map(is_plain, text.split("\n"))):
        text = json.dumps(value, indent=1, default=as_json)
    waiting.interrupt()
    sys.stdout.write(text + "\n")
