"""`eutectic check` answers with an exit code, a table and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from eutectic.cli.main import app
from helpers.cli import invoke

Eutectic = Callable[..., Any]


def test_sound_folders(models: Path) -> None:
    answer = invoke("check", "base", "a", "b")
    assert answer.code == 0
    assert answer.out.startswith(
        "checkpoint kind type tensors numbers wrong unusual base checkpoint"
    )
    assert "a checkpoint, llama float32 10" in answer.out


def test_what_is_wrong(models: Path) -> None:
    (models / "b" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 9}))
    weights = load_file(models / "b" / "model.safetensors")
    weights["model.layers.0.norm.weight"][2] = float("inf")
    save_file(weights, models / "b" / "model.safetensors", metadata={"format": "pt"})
    plain = invoke("check", "base", "b")
    assert plain.code == 1
    assert "wrong 'model.embed_tokens.weight' has 12 rows" in plain.out
    assert "not finite" not in plain.out
    answer = invoke("check", "b", "--base", "base", "--values", "--json")
    assert answer.code == 1
    document = json.loads(answer.out)
    assert document["sound"] is False
    (one,) = document["checked"]
    assert one["path"] == "b"
    assert {fault["kind"] for fault in one["faults"]} == {"vocab_size", "not_finite"}
    assert one["faults"][-1]["where"] == "model.layers.0.norm.weight"
    assert one["dtypes"] == {"float32": one["numbers"]}


def test_what_is_wrong_with_the_request(models: Path) -> None:
    assert invoke("check").code == 2
    answer = invoke("check", "a", "--base", "nowhere")
    assert (answer.code, answer.out) == (1, "")
    assert "nowhere" in answer.err


def test_eighty_columns_suffice(models: Path) -> None:
    (models / "a" / "model.safetensors.incomplete").write_bytes(b"x")
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["check", "base", "a"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in lines[0]


def test_names_do_nothing_in_a_terminal(models: Path) -> None:
    weights = load_file(models / "a" / "model.safetensors")
    weights["\x1b[31m[bold]x"] = weights["model.layers.0.norm.weight"].clone()
    weights["\x1b[31m[bold]x"][0] = float("nan")
    save_file(weights, models / "a" / "model.safetensors", metadata={"format": "pt"})
    answer = invoke("check", "a", "--values")
    assert answer.code == 1
    assert "\\x1b[31m[bold]x" in answer.out
    assert "\x1b" not in answer.out
