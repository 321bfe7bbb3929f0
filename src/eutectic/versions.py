"""Versions of installed packages, read once: each look-up parses a package's whole description."""

from functools import cache
from importlib import metadata

version = cache(metadata.version)
