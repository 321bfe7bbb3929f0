"""`NAME:KEY=VALUE,KEY=VALUE`: something with its parameters in one word of a command line."""

import re
from typing import Any

from eutectic.errors import RequestError
from eutectic.recipes.plain_yaml import UNREADABLE, load_plain

_OWN_COMMA = re.compile(r",(?![^\[{(]*[\]})])")  # not one inside brackets


def name_and_values(word: str, what: str, example: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the values, read as a recipe's are.

    Raises:
        RequestError: a word of another form; it calls the word `what` and shows an example.
    """
    name, _, rest = word.partition(":")
    found: dict[str, Any] = {}
    for part in filter(None, _OWN_COMMA.split(rest)):
        key, separator, value = part.partition("=")
        try:
            if not (separator and key.strip()) or key.strip() in found:
                raise ValueError
            found[key.strip()] = load_plain(value)
        except (ValueError, *UNREADABLE):
            raise RequestError(
                f"the {what} '{word}' must have the form NAME or NAME:KEY=VALUE,KEY=VALUE, such as "
                f"{example}."
            ) from None
    return name.strip(), found
