"""What returned objects show of themselves: aligned text in a notebook, and data frames."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import Any

from eutectic.errors import MissingExtraError
from eutectic.words import counted, plain, with_urls

_LEFT = ' style="text-align:left"'


class Shown(str):
    """A text as a terminal shows it, and the same as HTML for notebooks."""

    html: str

    @classmethod
    def of(cls, text: str, markup: str) -> Shown:
        """Return a text with its HTML."""
        found = cls(text)
        found.html = markup
        return found


class InNotebooks:
    """Objects that notebooks show as tables."""

    def _parts(self) -> Sequence[Shown]:
        """Return what is shown, from the top."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        """Return it as HTML, every text in it escaped."""
        return "<div>" + "".join(part.html for part in self._parts()) + "</div>"


_COLUMNS = 100
MOST_ROWS = 40  # of a table in a repr


def facts(title: str, known: Mapping[str, object]) -> Shown:
    """Return a title and, below it, one line per fact; those that are None or empty are left out.

    >>> print(facts("MergeReport", {"method": "iso_c", "heads": "", "took": "1 s"}))
    MergeReport
      method  iso_c
      took    1 s
    """
    told = {
        name: with_urls(str(value))
        for name, value in known.items()
        if value not in (None, "", (), [])
    }
    wide = max(map(len, told), default=0)
    lines: list[str] = []
    for name, text in told.items():
        parts = [part for line in text.split("\n") for part in _wrapped(line, _COLUMNS - wide - 4)]
        lines += [f"  {name if i == 0 else '':<{wide}}  {part}" for i, part in enumerate(parts)]
    rows = "".join(
        f"<tr><th{_LEFT}>{_escaped(name)}</th><td{_LEFT}>{_escaped(text)}</td></tr>"
        for name, text in told.items()
    )
    markup = f"<p><b>{_escaped(title)}</b></p>" + (f"<table>{rows}</table>" if rows else "")
    return Shown.of("\n".join([title, *lines]), markup)


def _escaped(text: str) -> str:
    return html.escape(plain(text)).replace("\n", "<br>")


def _wrapped(text: str, columns: int) -> list[str]:
    return wrap(text, columns, break_long_words=False, break_on_hyphens=False) or [""]


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], most: int = MOST_ROWS) -> Shown:
    """Return rows under headers, the first column on the left, the others on the right.

    >>> print(table(["task", "loss"], [["a", "1.5"], ["bc", "12"]]))
    task  loss
    a      1.5
    bc      12
    """
    shown = [[str(cell) for cell in row] for row in rows[:most]]
    wide = [max(map(len, column)) for column in zip(headers, *shown, strict=True)]
    lines = [
        "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, wide, strict=True))
        ).rstrip()
        for row in (headers, *shown)
    ]
    more = f"… {counted(len(rows) - most, 'more row')}" if len(rows) > most else ""
    lines += [more] if more else []
    return Shown.of("\n".join(lines), _as_html(headers, shown, more))


def _as_html(headers: Sequence[str], rows: Sequence[Sequence[str]], more: str) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        styles = [_LEFT, *[' style="text-align:right"'] * (len(cells) - 1)]
        inner = "".join(
            f"<{tag}{style}>{_escaped(cell)}</{tag}>"
            for cell, style in zip(cells, styles, strict=True)
        )
        return f"<tr>{inner}</tr>"

    body = "".join(line(row, "td") for row in rows)
    end = f"<p>{_escaped(more)}</p>" if more else ""
    return f"<table><thead>{line(headers, 'th')}</thead><tbody>{body}</tbody></table>{end}"


def number(value: float | None, digits: int = 4) -> str:
    """Return a number to some digits, a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}g}"


def interval(value: float | None, bounds: Sequence[float] | None, digits: int = 3) -> str:
    """Return a number with its interval."""
    if value is None or bounds is None:
        return number(value, digits)
    return f"{value:.{digits}g} [{bounds[0]:.{digits}g}, {bounds[1]:.{digits}g}]"


def data_frame(rows: Iterable[Mapping[str, Any]], index: str | None = None) -> Any:
    """Return a `pandas.DataFrame` of rows, MissingExtraError where pandas is not installed."""
    try:
        import pandas
    except ImportError as error:
        raise MissingExtraError("pandas", "eval", "Making a data frame") from error
    made: Any = pandas.DataFrame(list(rows))
    return made if index is None or not len(made) else made.set_index(index)
