"""Processes of the command line, forked from one that has torch imported.

A process of its own costs seconds, nearly all of it for importing torch; these start at once.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["eutectic.tuning", "eutectic.statistics", "typer.main"])


class Forked:
    """A running function with its own output, as `subprocess.Popen` has it."""

    def __init__(self, target: Callable[..., object], *arguments: object) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name) / name for name in ("out", "err")]
        settings = (str(Path.cwd()), {**os.environ, "COLUMNS": "200"}, self._streams)
        self._process = _server.Process(target=_begin, args=(settings, target, arguments))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait for the end and return what was written to both streams."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired("forked", timeout)
        out, err = (path.read_text() if path.exists() else "" for path in self._streams)
        self._folder.cleanup()
        return out, err


def start_cli(*words: object, before: Callable[[], object] | None = None) -> Forked:
    """Start `eutectic WORDS`, after `before` (a function of a module) in the new process."""
    return Forked(_command_line, [str(word) for word in words], before)


def run_cli(
    *words: object, before: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `eutectic WORDS` to its end in a process of its own."""
    return _ended(start_cli(*words, before=before))


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code to its end in a process of its own."""
    return _ended(Forked(exec, code, {"__name__": "__main__"}))


def run_script(path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run `python PATH WORDS` to its end in a process of its own."""
    return _ended(Forked(_script, str(path), [str(word) for word in words]))


def _ended(process: Forked) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=1800)
    assert process.returncode is not None
    return subprocess.CompletedProcess([], process.returncode, out, err)


def _begin(
    settings: tuple[str, dict[str, str], list[Path]],
    target: Callable[..., object],
    arguments: tuple[object, ...],
) -> None:
    folder, environment, streams = settings
    for descriptor, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    target(*arguments)


def _script(path: str, words: list[str]) -> None:
    sys.argv = [path, *words]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def _command_line(words: list[str], before: Callable[[], object] | None) -> None:
    if before is not None:
        before()
    from eutectic.cli.main import main

    sys.argv = ["eutectic", *words]
    main()
