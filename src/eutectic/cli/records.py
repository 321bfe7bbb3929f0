"""Options as records: a command takes frozen dataclasses, typer sees one parameter per field."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, field, is_dataclass
from functools import cache
from inspect import Parameter, signature
from typing import Annotated, Any, get_type_hints

import typer


def option(default: Any, help: str, *names: str, **settings: Any) -> Any:
    """Declare a field or parameter as an option, see `typer.Option`; `...` has no default."""
    return _declared(default, typer.Option(*names, help=help, **settings))


def argument(default: Any, help: str, **settings: Any) -> Any:
    """Declare a field or parameter as an argument, see `typer.Argument`; `...` has no default."""
    return _declared(default, typer.Argument(help=help, **settings))


def _declared(default: Any, kind: Any) -> Any:
    default = MISSING if default is ... else default
    return field(default=default, metadata={"parameter": kind})


def parameters_of(owner: Callable[..., Any]) -> Iterator[Parameter]:
    """Yield the parameters of a command or a record, with the fields of records in their places.

    A field with `init=False` is no parameter.
    """
    declared: dict[str, Any] = getattr(owner, "__dataclass_fields__", {})
    for name, parameter in signature(owner).parameters.items():
        kind, default = _hints(owner)[name], parameter.default
        if _is_record(kind):
            yield from parameters_of(kind)
            continue
        found: Any = default if isinstance(default, Field) else declared.get(name)
        if found is not None and "parameter" in found.metadata:
            kind = Annotated[kind, found.metadata["parameter"]]
            default = Parameter.empty if found.default is MISSING else found.default
        yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def call_with_records(owner: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Call a command, or make a record, with the records that its parameters are annotated with."""
    return owner(
        **{
            name: call_with_records(kind, values) if _is_record(kind) else values[name]
            for name in signature(owner).parameters
            for kind in (_hints(owner)[name],)
        }
    )


@cache
def _hints(owner: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def _is_record(kind: Any) -> bool:
    return is_dataclass(kind)
