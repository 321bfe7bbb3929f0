"""Options that several verbs share, each declared once, and which of them were given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from eutectic.cli.records import option, parameters_of
from eutectic.errors import RequestError

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
StatisticsFiles = Annotated[
    list[str] | None,
    typer.Option("--statistics", "-s", metavar="NAME=FILE", help="Statistics of an expert."),
]


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """What a merge may use of the machine."""

    threads: int | None = option(
        None, "Tensors merged side by side (default: one per core).", min=1
    )
    memory: str | None = option(None, "Limit, such as 4GB (default: 60 % of what is available).")


def given_options(context: typer.Context, record: type[Any] | None = None) -> dict[str, str]:
    """Return parameter -> option (`max_length` -> `--max-length`) of those that were typed.

    An option typed with its default value is among them, one that was left out is not.

    Args:
        context: of the command.
        record: return only the options of this record.
    """
    wanted = None if record is None else {parameter.name for parameter in parameters_of(record)}
    return {
        parameter.name: parameter.opts[0]
        for parameter in context.command.params
        if parameter.name
        and (wanted is None or parameter.name in wanted)
        and _typed(context, parameter.name)
    }


def refuse(options: Sequence[str], why: str, instead: str) -> None:
    """Raise RequestError where options were given that would be ignored."""
    if options:
        verb = "is" if len(options) == 1 else "are"
        raise RequestError(
            f"{', '.join(options)} {verb} {why}\n{instead} Otherwise leave "
            f"{'it' if len(options) == 1 else 'them'} out."
        )


def _typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
