"""Merging methods as pure functions. Importing this package imports all its modules: the table."""

import pkgutil
from importlib import import_module

from eutectic.methods.matrices import merge_matrices, methods
from eutectic.methods.post import Post, all_posts, as_post, get_post
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
    "Post",
    "Rules",
    "Takes",
    "all_methods",
    "all_posts",
    "always",
    "as_post",
    "get_method",
    "get_post",
    "merge_matrices",
    "methods",
    "register",
]


for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
