"""What lies beside a path that leads nowhere: a slip of the pen is told with what was meant."""

import itertools
import os
from difflib import get_close_matches
from pathlib import Path

from eutectic.storage.remote_urls import is_url, url_of

_LOOKED_AT = 2000  # names in one folder; where there are more, none is proposed


def meant(path: str | Path) -> str:
    """Return `` Did you mean 'x'?`` for a local path whose last wrong part is nearly a name there.

    Nothing for a URL, for a path that exists, and where no name is near.
    """
    if is_url(str(path)) or url_of(path) is not None:
        return ""
    try:
        parts = Path(path).parts
        there = next(n for n in range(len(parts)) if not Path(*parts[: n + 1]).exists())
        with os.scandir(Path(*parts[:there])) as entries:
            names = [e.name for e in itertools.islice(entries, _LOOKED_AT)]
        near = get_close_matches(parts[there], names, n=1, cutoff=0.75)
        longer = [name for name in names if name.startswith(f"{parts[there]}.")]
        near = near or (longer if len(longer) == 1 else [])  # an ending was left out
        if len(names) == _LOOKED_AT or not near:
            return ""
        found = Path(*parts[:there], near[0], *parts[there + 1 :])
        return f" Did you mean '{found}'?" if found.exists() else ""
    except (OSError, ValueError, StopIteration):
        return ""
