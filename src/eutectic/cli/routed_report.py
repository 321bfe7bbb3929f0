"""What `route` prints of a routed model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from eutectic.cli.console import out, print_json, tell_done
from eutectic.recipes.units import format_bytes


def report_routed(report: Mapping[str, Any], json: bool) -> None:
    """Print costs, experts and files as far as the report has them."""
    if json:
        print_json(report)
        return
    table = Table.grid(padding=(0, 2))
    costs = report.get("costs")
    if costs:
        share = costs["parameters"] / costs["model_parameters"]
        work = costs["multiply_adds_per_token"] / costs["model_multiply_adds_per_token"]
        table.add_row("routed layers", str(costs["layers"]))
        table.add_row(
            "adds",
            f"{costs['parameters']:,} parameters (+{share:.1%}), {format_bytes(costs['nbytes'])}",
        )
        table.add_row(
            "per token", f"{costs['multiply_adds_per_token']:,} multiply-adds (+{work:.1%})"
        )
    if "experts" in report:
        table.add_row("experts", escape(", ".join(report["experts"])))
        table.add_row("router", report["router"])
    for path, rank in report.get("layers", {}).items():
        table.add_row(path, f"rank {rank}")
    for name in report.get("left_out", []):
        table.add_row("left out", f"{name}: its queries and keys differ")
    if report.get("short"):
        table.add_row(
            "note",
            f"{len(report['short'])} layers have experts with fewer directions than the "
            "rank: too few tokens, or nothing left to add",
        )
    out.print(table)
    for key in ("output", "export"):
        if key in report:
            tell_done("written", report[key])
