"""Texts of others as a page may publish them."""

import re

_PRIVATE = re.compile(r"(?<![\w.:/])(?:/|~/|[A-Za-z]:\\)(?:[^\s/\\'\",;:]+[/\\])+([^\s/\\'\",;:]*)")


def without_private_paths(text: str) -> str:
    """Return a text with the last part only of every absolute path in it.

    >>> without_private_paths("statistics of /home/me/runs/a.safetensors, see https://x.org/a/b")
    'statistics of a.safetensors, see https://x.org/a/b'
    """
    return _PRIVATE.sub(r"\1", text)
