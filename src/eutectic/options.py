"""Keyword arguments of public functions as frozen records."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from eutectic.errors import RequestError, suggest

Record = TypeVar("Record")


def options_from(record: type[Record], given: Mapping[str, Any], of: str) -> Record:
    """Return the keyword arguments of the function `of` as a record; unknown ones are refused."""
    known = [field.name for field in fields(record)]  # pyright: ignore[reportArgumentType]
    for name in given:
        if name not in known:
            raise RequestError(
                f"{of} has no option '{name}'.{suggest(name, known)}\nIt has: {', '.join(known)}."
            )
    return record(**given)
