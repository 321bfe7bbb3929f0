"""Sizes in bytes, read and written as people do."""

import re
from decimal import Decimal

from eutectic.errors import RequestError

_FACTORS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY = {"ki": 1024, "mi": 1024**2, "gi": 1024**3, "ti": 1024**4}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_bytes(text: str | int) -> int:
    """Return a number of bytes from `4000000`, `"4GB"`, `"1.5GiB"` or `"500 M"`."""
    if isinstance(text, int):
        return text
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise RequestError(f"'{text}' is not a size in bytes. Write it like 4GB, 512MiB or 800000.")
    return int(Decimal(match[1]) * {**_FACTORS, **_BINARY}[(match[2] or "").lower()])


def format_bytes(count: float) -> str:
    """Return a size to three digits: `1.25 GB`, `512 MB`, `800 B`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:  # beyond, three digits round to the next unit
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
