"""Python's collector of cycles, which planning does without."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect no cycles while the block runs: it makes records by the million, and no cycles.

    The collector would go through all of them again and again, which took more than half of the
    time of a plan of 50,000 tensors.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
