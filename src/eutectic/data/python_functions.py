"""Functions that a user names, as `module:function` or `file.py:function`.

`sys.path` stays as it is. A folder put there would be asked first, so that a `transformers.py` that
happens to lie in it would be imported in place of the package, by whoever imports it next.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from eutectic.errors import RequestError
from eutectic.storage.small_files import check_regular


@contextmanager
def imported(name: str, *, trust_code: bool) -> Iterator[Callable[..., Any]]:
    """Import `module:function` or `file.py:function`, which runs that code, and use it inside.

    Inside, modules that are not installed are looked for in the working folder too, those that a
    file imports beside it.
    """
    if not trust_code:
        raise untrusted(name)
    where, _, attribute = name.rpartition(":")
    is_file = where.endswith(".py")
    beside = _Beside(str(Path(where).resolve().parent if is_file else Path.cwd()))
    sys.meta_path.append(beside)
    try:
        try:
            module = _file_as_module(where) if is_file else importlib.import_module(where)
            function = getattr(module, attribute)
        except Exception as error:  # whatever the code does on import
            raise RequestError(
                f"'{name}' cannot be imported: {type(error).__name__}: {error}."
            ) from error
        yield function
    finally:
        sys.meta_path.remove(beside)


def untrusted(name: str, task: str = "") -> RequestError:
    """Return the error that a function is named and code is not allowed."""
    return RequestError(
        f"{task}'{name}' runs Python code.\n"
        "Add --trust-code (trust_code=True) if you trust it, or check the path if you meant a file."
    )


def source_file(where: str) -> Path | None:
    """Return the file of a function's code, without running any: `file.py`, or a module's name.

    None for a module that does not exist or is not a Python file.
    """
    if where.endswith(".py"):
        return Path(where)
    path: Sequence[str] | None = [*sys.path, str(Path.cwd())]
    spec = None
    for depth in range(1, where.count(".") + 2):
        spec = PathFinder.find_spec(".".join(where.split(".")[:depth]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    found = Path(spec.origin) if spec is not None and spec.origin else None
    return found if found is not None and found.suffix == ".py" and found.is_file() else None


@dataclass(frozen=True)
class _Beside:
    """Finds modules in a folder, for whoever asks it last."""

    folder: str

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return what there is of this name in the folder; parts of packages are found by them."""
        return PathFinder.find_spec(name, [self.folder]) if path is None else None


def _file_as_module(file: str) -> ModuleType:
    """Return a file as a module, under a name that no other module has."""
    name = f"_eutectic_{hashlib.sha256(file.encode()).hexdigest()[:16]}"
    check_regular(Path(file))
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module in {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look for a class's module there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
