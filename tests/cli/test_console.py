"""Errors of the machine in words, and terminals that print no UTF-8."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from eutectic.cli.console import verb
from helpers.folders import make_base, make_expert, save
from helpers.processes import run_cli


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 8 EiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        OSError(12, "Cannot allocate memory"),
        OSError(27, "File too large", "out/model.safetensors"),
    ],
)
def test_what_the_machine_refuses_is_said_in_words(error: Exception) -> None:
    @verb
    def work() -> None:
        """Fail."""
        raise error

    app = typer.Typer()
    app.command()(work)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr and result.stderr.startswith("error:")
    assert any(word in result.stderr for word in ("memory", "too large"))


def test_other_errors_of_programs_are_not_hidden() -> None:
    @verb
    def work() -> None:
        """Fail."""
        raise RuntimeError("a shape is wrong")

    app = typer.Typer()
    app.command()(work)
    assert isinstance(CliRunner().invoke(app, []).exception, RuntimeError)


def _ascii_only() -> None:
    sys.stdout.reconfigure(encoding="ascii", errors="strict")  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_terminal_without_utf_8(options: list[str], tmp_path: Path) -> None:
    base = make_base(layers=1, width=8)
    save(tmp_path / "base", base)
    for i, name in enumerate("ab"):
        save(tmp_path / name, make_expert(base, i))
    experts = [f"{name}={tmp_path / name}" for name in "ab"]
    # λ is no letter of ASCII.
    words: list[Any] = ["merge", "--base", tmp_path / "base", "-m", "average", *options, *experts]
    result = run_cli(*words, "--sweep", "0.5", "-o", tmp_path / "λ", before=_ascii_only)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "λ/0.5/model.safetensors").exists()
    if options:
        assert "λ/0.5" in json.loads(result.stdout)["0.5"]["output"]
    else:
        assert "\\u03bb" in result.stdout
