"""Guards what every verb shares: help with examples, exit codes, errors in a few lines."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer

from eutectic.cli import console, main, named_words
from eutectic.errors import CheckpointError, RequestError
from helpers.processes import run_cli

VERBS = [command.callback.__name__ for command in main.app.registered_commands]


def test_the_verbs():
    assert {"merge", "plan", "methods", "demo"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(eutectic, verb):
    result = eutectic(verb, "--help")
    assert result.exit_code == 0
    assert f"eutectic {verb} " in result.stdout.partition("Example")[2]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("verb", VERBS)
def test_paragraphs_of_help_flow(eutectic, monkeypatch, verb, width):
    """No line ends before the next line's first word would have been too much for it."""
    monkeypatch.setenv("COLUMNS", str(width))
    lines = eutectic(verb, "--help").stdout.partition("Example")[0]
    lines = lines.partition("Usage:")[2].splitlines()[1:]
    for line, following in zip(lines, lines[1:], strict=False):
        if line.strip() and following.strip():
            first = following.split()[0]
            assert len(line.rstrip()) + 1 + len(first) > width - 2, (line, following)


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_help_can_be_copied(eutectic, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    text = eutectic(verb, "--help").stdout.partition("Example")[2].partition("\n")[2]
    shown = [line.lstrip() for line in text.partition("╭")[0].splitlines()]
    commands = "\n".join(shown).replace("\\\n", "").split("\n")
    assert commands and all(c.startswith("eutectic ") for c in commands if c)


def test_version(eutectic):
    result = eutectic("--version")
    assert result.exit_code == 0
    assert result.stdout == f"eutectic {version('eutectic')}\n"


def test_unknown_verbs_and_options_are_wrong_requests(eutectic):
    assert eutectic("smelt").exit_code == 2
    assert eutectic("methods", "--colour").exit_code == 2


def test_the_help_of_a_process_starts_without_torch():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from eutectic.cli.main import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_wrong_request_in_a_process():
    result = run_cli("methods", "iso_d")
    assert result.returncode == 2
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith("error: unknown method 'iso_d'. Did you mean 'iso_")
    assert second.startswith("Known methods: ")


def test_debug_shows_the_traceback():
    result = run_cli("--debug", "methods", "iso_d")
    assert result.returncode not in (0, 2)
    assert "Traceback (most recent call last)" in result.stderr
    assert "MethodError: unknown method 'iso_d'" in result.stderr


def test_the_installed_script():
    script = os.path.join(os.path.dirname(sys.executable), "eutectic")  # noqa: PTH118, PTH120
    result = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("eutectic ")


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (CheckpointError("first\nsecond"), 1, ["error: first", "second"]),
        (RequestError("a [bold]name[/bold]"), 2, ["error: a [bold]name[/bold]"]),
        (RequestError(), 2, ["error: RequestError"]),
        (
            OSError(28, "No space left on device", "x"),
            1,
            ["error: x: the disk is full: No space left on device."],
        ),
        (KeyboardInterrupt(), 130, ["interrupted; the same command continues where it stopped."]),
    ],
)
def test_errors_become_lines_and_exit_codes(capsys, error, code, lines):
    @console.verb
    def fail():
        raise error

    with pytest.raises(typer.Exit) as caught:
        fail()
    assert caught.value.exit_code == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == lines


def test_errors_that_nobody_expects_are_not_hidden():
    @console.verb
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


@pytest.mark.parametrize("word", ["a", "=b", "a=", ""])
def test_words_that_are_no_pairs(word):
    with pytest.raises(RequestError, match="must have the form name=value"):
        named_words.pairs([word], "--param")


def test_pairs():
    assert named_words.pairs(["a=b=c", "x=1"], "--param") == {"a": "b=c", "x": "1"}
    with pytest.raises(RequestError, match="--param 'a' is given twice"):
        named_words.pairs(["a=1", "a=2"], "--param")


def test_help_imports_nothing_that_is_slow():
    heavy = ("torch", "numpy", "transformers", "asyncio", "webbrowser", "jinja2", "fsspec", "ray")
    code = f"import sys, eutectic.cli.main; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
