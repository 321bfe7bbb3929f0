"""Merging methods as pure functions. Importing this package fills the registry."""

import sys
from types import ModuleType
from typing import Any

from eutectic.methods import arithmetic as arithmetic
from eutectic.methods import essential as essential
from eutectic.methods import isotropic as isotropic
from eutectic.methods import linear as linear
from eutectic.methods import matching as matching
from eutectic.methods import regmean as regmean
from eutectic.methods import singular as singular
from eutectic.methods import sparsify as sparsify
from eutectic.methods import spherical as spherical
from eutectic.methods import ties as ties
from eutectic.methods.matrices import merge_matrices, methods
from eutectic.methods.registry import (
    Context,
    Method,
    Parameters,
    all_methods,
    get_method,
    register,
)

__all__ = [
    "Context",
    "Method",
    "Parameters",
    "all_methods",
    "get_method",
    "merge_matrices",
    "methods",
    "register",
]


class _Room(ModuleType):
    """A package that can be called: importing it anywhere binds `eutectic.methods` to it."""

    def __call__(self) -> dict[str, dict[str, Any]]:
        return methods()


sys.modules[__name__].__class__ = _Room
