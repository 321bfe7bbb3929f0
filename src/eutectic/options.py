"""Keyword arguments of public functions as frozen records."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from eutectic.errors import RequestError, suggest

Record = TypeVar("Record")


def options_from(record: type[Record], given: Mapping[str, Any], of: str) -> Record:
    """Return the keyword arguments of a function as a record; absent ones have their defaults.

    Raises:
        RequestError: a name that the record does not have; `of` names the function.
    """
    known = [field.name for field in fields(record)]  # pyright: ignore[reportArgumentType]
    for name in given:
        if name not in known:
            raise RequestError(
                f"{of} has no option '{name}'.{suggest(name, known)}\nIt has: {', '.join(known)}."
            )
    return record(**given)
