"""`eutectic demo`."""

from __future__ import annotations

import typer

from eutectic.cli.console import verb


@verb
def demo() -> None:
    """Merge."""
