"""Progress in notebooks: a bar with times, below the cell that runs, without further packages."""

from __future__ import annotations

import functools
import html
import sys
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")
_EVERY = 0.1  # seconds between two states that are shown
Tell = Callable[..., None]


def in_notebook() -> bool:
    """Tell whether a notebook's kernel runs this: IPython in a terminal is none."""
    shell: Any = sys.modules.get("IPython")
    found = shell.get_ipython() if shell is not None and hasattr(shell, "get_ipython") else None
    return getattr(found, "kernel", None) is not None


def with_bar(title: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Let a function show a bar in notebooks where its keyword `progress` is not given.

    The keyword takes a function of (done, total, what is being done), of which all but the first
    may be missing or None; whoever wants no bar passes one that does nothing.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if kwargs.get("progress") is not None or not in_notebook():
                return function(*args, **kwargs)
            bar = Bar(title)
            kwargs["progress"] = bar
            try:
                found = function(*args, **kwargs)
            except BaseException:
                bar.close("stopped")
                raise
            bar.close("done")
            return found

        return run

    return decorate


class Bar:
    """A bar in a notebook's output, told how much is done."""

    def __init__(self, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Show the bar; `clock` tells the seconds."""
        self._title, self._clock = title, clock
        self._begun, self._shown = clock(), 0.0
        self._state: tuple[float, float | None, str] = (0.0, None, "")
        self._display = _display(self._drawn(""))

    def __call__(self, done: float, total: float | None = None, current: str = "") -> None:
        """Tell how much is done of how much, and what is being done now."""
        self._state = (done, total, current)
        now = self._clock()
        if now - self._shown >= _EVERY:
            self._shown = now
            self._update("")

    def close(self, end: str) -> None:
        """Show how it ended, and how long it took."""
        self._update(end)

    def _update(self, end: str) -> None:
        if self._display is not None:
            self._display.update(_markup(self._drawn(end)))

    def _drawn(self, end: str) -> str:
        done, total, current = self._state
        elapsed = self._clock() - self._begun
        told = [f"{_clock(elapsed)} elapsed"]
        attributes = ""
        if end == "done":
            attributes = ' value="1" max="1"'
        elif total:
            share = min(max(done / total, 0.0), 1.0)
            attributes = f' value="{share:.4f}" max="1"'
            told.insert(0, f"{share:.0%}")
            if not end and 0 < share < 1:
                told.append(f"{_clock(elapsed * (1 - share) / share)} left")
        told += [end] if end else [current] if current else []
        text = html.escape(", ".join(told))
        return f"<div>{html.escape(self._title)} <progress{attributes}></progress> {text}</div>"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _markup(text: str) -> Any:
    from IPython.display import HTML  # pyright: ignore - there is a notebook, so there it is

    return HTML(text)


def _display(text: str) -> Any:
    """Show a text in the notebook; what is returned replaces it."""
    from IPython.display import display  # pyright: ignore

    return display(_markup(text), display_id=True)
