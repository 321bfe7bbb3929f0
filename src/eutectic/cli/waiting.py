"""A line that says what is being done where nothing was printed for a second."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.status import Status

_SILENCE = 1.0  # seconds


class Waiting:
    """What is being done, shown at the terminal after a second of silence, until it is printed on.

    Prints call `interrupt` first: they begin on a clean line, and the second anew. `console` is
    where it is shown, if that is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.RLock()
        self._text = ""
        self._held = 0
        self._timer: threading.Timer | None = None
        self._status: Status | None = None

    def say(self, text: str) -> None:
        """Begin to do something; "" is the end of everything."""
        with self._lock:
            self._text = text
            if self._status is not None and text:
                self._status.update(f"[dim]{text} …[/]")
            elif self._timer is None or not text:
                self.interrupt()

    def interrupt(self) -> None:
        """Clear the line, if it is there, and wait anew."""
        with self._lock:
            timer, status = self._timer, self._status
            self._timer = self._status = None
            if timer is not None:
                timer.cancel()
            if status is not None:
                status.stop()
            if self._text and not self._held and self._console.is_terminal:
                self._timer = threading.Timer(_SILENCE, self._show)
                self._timer.daemon = True
                self._timer.start()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Show nothing while something else does, such as a bar."""
        with self._lock:
            self._held += 1
            self.interrupt()
        try:
            yield
        finally:
            with self._lock:
                self._held -= 1
                self.interrupt()

    def _show(self) -> None:
        with self._lock:
            self._timer = None
            if self._text and not self._held and self._status is None:
                self._status = Status(f"[dim]{self._text} …[/]", console=self._console)
                with suppress(Exception):  # another bar is on: that says enough
                    self._status.start()
