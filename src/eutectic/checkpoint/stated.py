"""What a file from elsewhere states, checked against a model of it."""

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from eutectic.words import plain, shown

Stated = TypeVar("Stated", bound=BaseModel)


def checked(
    model: type[Stated], values: Any, where: object, error: Callable[[str], Exception]
) -> Stated:
    """Return the values as the model; raise `error` of a text that names the first fault."""
    try:
        return model.model_validate(values)
    except ValidationError as fault:
        raise error(f"{where}: {wrong(fault)}.") from None
    except RecursionError:
        raise error(f"{where}: nested too deep.") from None


def wrong(fault: ValidationError) -> str:
    """Return in words what is wrong first."""
    item = fault.errors(include_url=False)[0]
    place = ".".join(plain(str(part), kept="")[:80] for part in item["loc"])
    if item["type"] == "missing":
        return f"'{place}' is missing"
    what = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"'{place}' has the wrong type or value: it {what}, got {shown(item['input'])}"
