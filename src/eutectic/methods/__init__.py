"""Merging methods as pure functions. Importing this package imports all its modules: the table."""

import pkgutil
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from eutectic.methods.matrices import merge_matrices, methods
from eutectic.methods.registry import (
    Context,
    Cost,
    Method,
    Parameters,
    Rules,
    Takes,
    all_methods,
    always,
    get_method,
    register,
)

__all__ = [
    "Context",
    "Cost",
    "Method",
    "Parameters",
    "Rules",
    "Takes",
    "all_methods",
    "always",
    "get_method",
    "merge_matrices",
    "methods",
    "register",
]


for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


class _Room(ModuleType):
    """A package that can be called, because two things have one public name.

    `eutectic.methods()` lists the methods, and Python binds `eutectic.methods` to this package as
    soon as anything imports it: an attribute of `eutectic` could not stay a function.
    """

    def __call__(self) -> dict[str, dict[str, Any]]:
        return methods()


sys.modules[__name__].__class__ = _Room
