"""The command line inside this process."""

from __future__ import annotations

import os


def invoke(*words: object) -> str:
    """Run `eutectic WORDS` and return what it prints to stdout.

    Raises:
        RuntimeError: it failed; the message is the first line of stderr.
    """
    from typer.testing import CliRunner

    from eutectic.cli.main import app

    os.environ["COLUMNS"] = "200"
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"exit code {result.exit_code}: {' '.join(lines)}")
    return result.stdout
