"""What `eutectic inspect` says of statistics files."""

import json
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from typer.testing import CliRunner

import eutectic
from eutectic.cli.main import app
from eutectic.errors import RequestError
from eutectic.reporting.held_statistics import inspect_statistics, kept_in_words
from eutectic.statistics.gram_forms import GramForm


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two layers of 40 inputs that share them, in 5 directions, in few rows, and whole."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.a = torch.nn.Linear(40, 3), torch.nn.Linear(40, 3)

        def forward(self, input):
            return self.a(input) + self.b(input)

    folder, found = tmp_path_factory.mktemp("statistics"), {}
    for name, tokens, rank in (("few", 90, 5), ("rows", 12, None), ("whole", 90, None)):
        generator = torch.Generator().manual_seed(1)
        rows = [{"input": torch.randn(tokens, 40, generator=generator)}]
        found[name] = folder / f"{name}.stats.safetensors"
        eutectic.collect(Two(), rows, output=found[name], rank=rank)
    return found


def inspected(*words):
    return CliRunner().invoke(app, ["inspect", *map(str, words)])


def test_every_gram_has_its_form_and_its_error(files):
    found = inspect_statistics(files)["statistics"]
    assert [held["examples"] for held in found.values()] == [90, 12, 90]
    grams = {name: held["grams"] for name, held in found.items()}
    assert [len(own) for own in grams.values()] == [1, 1, 1]  # two layers share one
    few, rows, whole = (own[0] for own in grams.values())
    assert sorted(few["layers"]) == ["a.weight", "b.weight"]
    assert [g["directions"] for g in (few, rows, whole)] == [5, 12, None]
    assert rows["beside"] is whole["beside"] is None
    entry = eutectic.load_statistics(files["few"])["a.weight"]
    dense = eutectic.load_statistics(files["whole"])["a.weight"].gram.double()
    below = dense - entry.gram_factor.double().mT @ entry.gram_factor.double()
    nuclear = float(torch.linalg.eigvalsh(below).abs().sum())
    assert few["beside"] == pytest.approx(nuclear / float(dense.trace()), rel=1e-3)
    assert few["nbytes"] == 4 * 6 * 40 and whole["nbytes"] == 4 * 40 * 40


def test_the_command_shows_a_table_and_writes_the_same(files, tmp_path):
    file = tmp_path / "held.json"
    result = inspected(files["few"], f"all={files['whole']}", "-o", file)
    assert result.exit_code == 0, result.output
    assert "few: 1 input Gram of 90 examples" in result.output
    beside = inspect_statistics({"few": files["few"]})["statistics"]["few"]["grams"][0]["beside"]
    assert f"5 directions {100 * beside:.2g} %" in " ".join(result.output.split())
    assert "whole" in result.output and "nuclear norm" in result.output
    printed = json.loads(inspected(files["few"], f"all={files['whole']}", "--json").stdout)
    assert json.loads(file.read_text()) == printed
    assert inspected(files["few"], "-o", file).exit_code == 0  # its own file is replaced


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--base", "x"], "--base is about models"),
        (["--rank", "3", "--error", "0.1"], "are about models"),
        (["--layers", "nothing"], "no layer is called like 'nothing'"),
        (["other.safetensors"], "other.safetensors does not"),
    ],
)
def test_what_does_not_go_with_statistics_is_refused(files, more, told):
    result = inspected(files["few"], *more)
    assert result.exit_code == 2 and told in " ".join(result.output.split())


def test_a_file_that_is_not_there_is_named(files, tmp_path):
    result = inspected(tmp_path / "none.stats.safetensors")
    assert result.exit_code == 2 and "no such file" in " ".join(result.output.split())
    result = inspected(files["few"], "missing")  # no model of the hub: a file beside others
    assert result.exit_code == 2
    assert "missing does not: no such file." in " ".join(result.output.split())


def test_another_file_is_not_replaced(files, tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(RequestError, match="holds something else"):
        inspect_statistics(files, output=tmp_path / "mine.json")


@pytest.mark.parametrize(("directions", "told"), [(1, "1 direction"), (1200, "1,200 directions")])
def test_one_direction_is_told_in_the_singular(directions, told):
    form = SimpleNamespace(adapters=None, directions=directions, beside=0.1)
    assert kept_in_words(cast(GramForm, form)) == told
