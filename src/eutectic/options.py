"""Keyword arguments of public functions as frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from eutectic.errors import RequestError, suggest

Record = TypeVar("Record")


def options_from(record: type[Record], given: Mapping[str, Any], of: str) -> Record:
    """Return keyword arguments as a record, with its defaults for those that are absent.

    Args:
        record: a dataclass with a default for every field.
        given: names and values.
        of: the function that takes them, for messages.

    Raises:
        RequestError: a name that the record does not have.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Sizes:
        ...     width: int = 1
        ...     height: int = 1
        >>> options_from(Sizes, {"width": 3}, "draw")
        Sizes(width=3, height=1)
    """
    known = [field.name for field in fields(record)]  # pyright: ignore[reportArgumentType]
    for name in given:
        if name not in known:
            raise RequestError(
                f"{of} has no option '{name}'.{suggest(name, known)}\nIt has: {', '.join(known)}."
            )
    return record(**given)
