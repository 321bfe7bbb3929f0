"""Guards `eutectic plan`: a table that fits the terminal, JSON, and every fault at once."""

from __future__ import annotations

import json

import pytest

WORDS = ("plan", "--base", "base", "-m", "iso_c", "a=a", "b=b")


@pytest.mark.parametrize("more", [(), ("--all",), ("--explain",)])
def test_no_line_is_longer_than_the_terminal(eutectic, models, monkeypatch, more):
    monkeypatch.setenv("COLUMNS", "80")
    result = eutectic(*WORDS, *more)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(len(line) for line in lines) <= 80
    assert {"tensor", "shape", "treatment", "method", "α"} <= set(lines[0].split())


def test_like_layers_are_folded(eutectic, models):
    text = eutectic(*WORDS).stdout
    assert "model.layers.*.mlp.down_proj.weight ×3" in text
    assert "biases and norms ×3" in text
    assert "reads" in text and "writes" in text and "peak about" in text


def test_nothing_is_written(eutectic, models):
    before = sorted(p for p in models.rglob("*"))
    assert eutectic(*WORDS).exit_code == 0
    assert sorted(p for p in models.rglob("*")) == before


def test_json_lists_every_tensor(eutectic, models):
    made = json.loads(eutectic(*WORDS, "--json", "--explain").stdout)
    assert made["method"] == "iso_c" and made["scale"] == 1.3
    rows = {row["name"]: row for row in made["tensors"]}
    assert len(rows) == 10
    assert rows["model.embed_tokens.weight"]["treatment"] == "embedding"
    assert rows["model.embed_tokens.weight"]["method"] == "average"
    assert rows["model.layers.0.mlp.down_proj.weight"]["method"] == "iso_c"
    assert rows["model.layers.0.mlp.down_proj.weight"]["route"]
    assert made["cost"]["read_bytes"] >= 3 * sum(row["write_bytes"] for row in made["tensors"])


def test_every_fault_at_once(eutectic, models):
    (models / "recipe.yaml").write_text(
        "base: ./base\nexperts: {a: ./nowhere}\nmethod: isoc\nscale: lots\n"
    )
    result = eutectic("plan", "recipe.yaml")
    assert result.exit_code == 2
    assert result.stdout == ""
    for words in ("(3 faults)", "line 2: ", "line 3: unknown method", "line 4: scale"):
        assert words in result.stderr
