"""The command line inside the test's own process."""

from __future__ import annotations

from dataclasses import dataclass

from typer.testing import CliRunner

from eutectic.cli.main import app


@dataclass(frozen=True)
class Answer:
    """Exit code and both streams, with runs of white space made one blank."""

    code: int
    out: str
    err: str


def invoke(*words: object) -> Answer:
    """Run `eutectic WORDS`; an exception that the command line lets through is raised."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.stderr
    return Answer(
        result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())
    )
