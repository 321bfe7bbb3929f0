"""Shell patterns over names, as users write them in recipes and tasks."""

import re
from collections.abc import Callable
from fnmatch import translate
from functools import lru_cache
from glob import escape


def fits(name: str, pattern: str) -> bool:
    """Tell whether a shell pattern (`*`, `?`, `[…]`) matches a whole name, case included."""
    return _compiled(pattern)(name) is not None


# Python's own `fnmatch` forgets all but 256, fewer than a recipe may have rules.
@lru_cache(maxsize=8192)
def _compiled(pattern: str) -> Callable[[str], object]:
    return re.compile(translate(pattern)).match


def containing(text: str) -> str:
    """Return the shell pattern of all names that contain a text.

    >>> containing("mlp"), fits("layers.0.mlp.up", containing("mlp"))
    ('*mlp*', True)
    """
    return f"*{escape(text)}*"
