"""Guards options as records: an option per field, in its place; records come back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from eutectic.cli.console import verb
from eutectic.cli.options import given_options


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: Annotated[int, typer.Option(help="Of the inner.")] = 3
    name: Annotated[str, typer.Option("--called", "-c")]


@dataclass(frozen=True, kw_only=True)
class Narrow(Inner):
    size: int = field(default=7, init=False)


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    flag: Annotated[bool, typer.Option("--flag")] = False


@dataclass(frozen=True, kw_only=True)
class NarrowOuter(Outer):
    inner: Narrow


def command_of(kind: type[Outer], seen: list[object]) -> typer.Typer:
    def command(*, context: typer.Context, first: str, outer, last: int = 1) -> None:
        """Do it."""
        seen[:] = [first, outer, last, given_options(context), given_options(context, Inner)]

    command.__annotations__["outer"] = kind
    app = typer.Typer()
    app.command()(verb(command))
    return app


def test_records_come_back_with_what_was_typed():
    seen: list[object] = []
    app = command_of(Outer, seen)
    result = CliRunner().invoke(app, ["x", "-c", "n", "--last", "2", "--size", "3"])
    assert result.exit_code == 0, result.output
    given = {"first": "first", "size": "--size", "name": "--called", "last": "--last"}
    of_inner = {"size": "--size", "name": "--called"}
    assert seen == ["x", Outer(inner=Inner(size=3, name="n")), 2, given, of_inner]


def test_options_stand_in_the_order_of_the_fields_with_their_help():
    shown = CliRunner().invoke(command_of(Outer, []), ["--help"]).output
    places = [shown.index(word) for word in ("--size", "Of the inner.", "--called", "--flag")]
    assert places == sorted(places) and shown.index("--flag") < shown.index("--last")
    assert "[default: 3]" in shown and "[required]" in shown


@pytest.mark.parametrize("words", [["x"], ["x", "-c", "n", "--inner", "1"]])
def test_a_required_field_and_an_unknown_option_are_refused(words: list[str]):
    assert CliRunner().invoke(command_of(Outer, []), words).exit_code == 2


def test_a_field_that_is_no_parameter_is_no_option():
    seen: list[object] = []
    app = command_of(NarrowOuter, seen)
    assert CliRunner().invoke(app, ["x", "-c", "n", "--size", "3"]).exit_code == 2
    assert CliRunner().invoke(app, ["x", "-c", "n"]).exit_code == 0
    assert isinstance(seen[1], Outer) and seen[1].inner.size == 7
