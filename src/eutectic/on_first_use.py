"""Names of a package that are imported when they are first asked for, and quickly."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def quick_imports() -> Iterator[None]:
    """Let the block import without Python's collector of garbage, which is put back as it was.

    Imports make hundreds of thousands of objects and no garbage: looking for some takes a third of
    the time of `import torch`.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def names_on_first_use(
    package: str, files: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package whose names stand in these files.

    A verb imports what it needs: importing a package costs nothing of its files. A name that is
    found stays in the package, so that a file of the same name does not take its place.
    """
    homes = {name: file for file, names in files.items() for name in names}

    def found(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        with quick_imports():
            value = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return found, lambda: sorted(homes)
