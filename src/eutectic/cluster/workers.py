"""What a worker process does: a function with what it keeps open, and who it is."""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eutectic.errors import EutecticError, RequestError
from eutectic.versions import version

_NO_MEMORY = re.compile(r"(can't|cannot) allocate|not enough memory|out of memory", re.I)
_kept: dict[str, tuple[Any, Callable[[], None]]] = {}


@dataclass(frozen=True)
class Answer:
    """What came of a call: a value, or an error as its class and text; and where it ran."""

    value: Any = None
    kind: type[BaseException] | None = None
    text: str = ""
    trace: str = ""  # of an error that nobody raises on purpose
    machine: str = ""  # see `this_machine`
    node: str = ""  # its address, for people

    @property
    def out_of_memory(self) -> bool:
        """Whether memory was refused; torch says so in the text of a RuntimeError."""
        return self.kind is not None and (
            issubclass(self.kind, MemoryError) or bool(_NO_MEMORY.search(self.text))
        )

    def error(self) -> BaseException:
        """Return the error, to be raised here."""
        kind = self.kind or EutecticError
        error = Exception.__new__(kind)  # its own arguments are in its text
        error.args = (self.text,)
        if self.trace and sys.version_info >= (3, 11):
            error.add_note(f"on worker {self.node}:\n{self.trace}")
        return error


def this_machine() -> str:
    """Return what tells machines apart whose writes this one does not see at once."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def versions() -> dict[str, str]:
    """Return the versions on which bytes depend."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"eutectic": version("eutectic"), "torch": version("torch"), "Python": python}


def kept(key: str, make: Callable[[], tuple[Any, Callable[[], None]]]) -> Any:
    """Return what this process keeps under a key; `make` opens it, and says how it is closed.

    What was kept under another key is closed first. A worker does one call at a time.
    """
    if key not in _kept:
        while _kept:
            _kept.popitem()[1][1]()
        _kept[key] = make()
    return _kept[key][0]


def answer(
    function: Callable[[Any], Any], payload: Any, expected: dict[str, str], node: str
) -> Answer:
    """Call a function on this worker; errors are returned as they are, with this machine's name."""
    machine = this_machine()
    try:
        _check_versions(expected, node)
        return Answer(function(payload), machine=machine, node=node)
    except EutecticError as error:
        return Answer(None, type(error), _named(str(error), node), "", machine, node)
    except Exception as error:
        plain = isinstance(error, (MemoryError, RuntimeError, ValueError, OSError, TypeError))
        plain = plain and type(error).__module__ == "builtins"
        kind = type(error) if plain else RuntimeError
        text = str(error) if plain else f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error))
        return Answer(None, kind, _named(text, node), trace, machine, node)


def _check_versions(expected: dict[str, str], node: str) -> None:
    found = versions()
    other = [name for name, known in expected.items() if found[name] != known]
    if other:
        there = ", ".join(f"{name} {found[name]}" for name in other)
        here = ", ".join(f"{name} {expected[name]}" for name in other)
        raise RequestError(
            f"worker {node} has {there}, this process has {here}: other versions may give other "
            "bytes.\nInstall the same versions on every machine of the cluster."
        )


def _named(text: str, node: str) -> str:
    """Return the text of an error with the worker in its first line."""
    first, *others = text.split("\n")
    return "\n".join([first if node in first else f"{first} (on worker {node})", *others])


@contextmanager
def working_in(folder: str) -> Iterator[None]:
    """Work in a folder, if it is there: paths that the user gave may begin there."""
    before = Path.cwd()
    if Path(folder).is_dir():
        os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
