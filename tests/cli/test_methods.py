"""Guards `eutectic methods`: the list, a page, and both as JSON."""

from __future__ import annotations

import json
import re

import pytest

from eutectic.methods import methods


def test_the_list_names_every_method(eutectic):
    result = eutectic("methods")
    assert result.exit_code == 0
    first_words = {line.split()[0] for line in result.stdout.splitlines() if line.strip()}
    assert set(methods()) <= first_words


@pytest.mark.parametrize("name", methods())
def test_a_page_has_formula_and_parameters(eutectic, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = eutectic("methods", name)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{name}: ")
    assert "Return" in result.stdout
    lines = result.stdout.splitlines()
    for parameter in methods()[name]["parameters"]:
        line = next(line for line in lines if line.startswith(f"{parameter}  "))
        assert len(re.split(r" {2,}", line.strip())) == 4, "name, type, default and meaning"


def test_types_and_bounds_are_shown(eutectic, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    page = " ".join(eutectic("methods", "ties").stdout.split())
    assert "density float ≥ 0, ≤ 1 0.2 fraction of entries kept per expert." in page
    assert "scope tensor | model tensor" in page
    page = " ".join(eutectic("methods", "tsv_m").stdout.split())
    assert "rank_fraction float > 0, ≤ 1 | null null share of the min(out, in)" in page


def test_json(eutectic):
    assert set(json.loads(eutectic("methods", "--json").stdout)) == set(methods())
    page = json.loads(eutectic("methods", "ties", "--json").stdout)
    assert page["parameters"]["density"]["default"] == 0.2
    assert page["family"] == "ties"


def test_an_unknown_name(eutectic):
    result = eutectic("methods", "tie")
    assert result.exit_code == 2
    assert "Did you mean 'ties'?" in result.stderr
    assert result.stdout == ""
