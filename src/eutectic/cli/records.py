"""Commands whose options are records: typer sees one parameter for every field."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from inspect import Parameter, signature
from typing import Any, get_type_hints


@cache
def _hints(owner: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def _is_record(kind: Any) -> bool:
    return is_dataclass(kind)


def parameters_of(owner: Callable[..., Any]) -> Iterator[Parameter]:
    """Yield the parameters of a command or a record, with the fields of records in their places.

    A field that the record declares with `init=False` is no option.
    """
    for parameter in signature(owner).parameters.values():
        kind = _hints(owner)[parameter.name]
        if _is_record(kind):
            yield from parameters_of(kind)
        else:
            yield parameter.replace(annotation=kind, kind=Parameter.KEYWORD_ONLY)


def call_with_records(owner: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Call a command, or make a record, with the records that its parameters are annotated with."""
    return owner(
        **{
            name: call_with_records(kind, values) if _is_record(kind) else values[name]
            for name in signature(owner).parameters
            for kind in (_hints(owner)[name],)
        }
    )
