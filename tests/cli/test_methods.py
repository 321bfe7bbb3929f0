"""Guards `eutectic methods`: the list, a page, and both as JSON."""

from __future__ import annotations

import json

import pytest

from eutectic.methods import methods


def test_the_list_names_every_method(eutectic):
    result = eutectic("methods")
    assert result.exit_code == 0
    first_words = {line.split()[0] for line in result.stdout.splitlines() if line.strip()}
    assert set(methods()) <= first_words


@pytest.mark.parametrize("name", methods())
def test_a_page_has_formula_and_parameters(eutectic, name):
    result = eutectic("methods", name)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{name}: ")
    assert "Return" in result.stdout
    for parameter in methods()[name]["parameters"]:
        assert parameter in result.stdout


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
