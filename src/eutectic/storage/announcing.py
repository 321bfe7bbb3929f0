"""Who writes a folder may be told of every file before it is made, replaced or removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_listener: ContextVar[Callable[[Path], None] | None] = ContextVar("listener", default=None)


@contextmanager
def announced_to(tell: Callable[[Path], None]) -> Iterator[None]:
    """Tell `tell` of every file that this thread is about to write; what it raises stops that."""
    token = _listener.set(tell)
    try:
        yield
    finally:
        _listener.reset(token)


def announce(file: Path) -> None:
    """Tell whoever wants to know that a file is about to be made, replaced or removed."""
    listener = _listener.get()
    if listener is not None:
        listener(file)
