"""What `eutectic route` says of a routed model: costs, experts, layers and routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from eutectic.cli.console import grid, out, print_json, print_named, tell_done, tell_notes
from eutectic.conventions import is_packed
from eutectic.recipes.units import format_bytes
from eutectic.words import between, counted, few

if TYPE_CHECKING:
    from eutectic.routed.router_quality import RouterQuality


def _why_left_out(name: str, names: Sequence[str]) -> str:
    parent = name.rpartition("out_proj.")[0]
    packed = is_packed(name) or any(is_packed(n) and n.startswith(parent) for n in names if parent)
    return "queries and keys differ" if packed else "a tower of which no statistics saw anything"


def tell_routed(
    report: Mapping[str, Any], json: bool, quality: RouterQuality | None = None
) -> None:
    """Print costs, experts and files as far as the report has them."""
    note = None if quality is None else quality.note()
    if json:
        tell_notes([note] if note else [], warnings_only=True)
        print_json(report)
        return
    table = grid()
    costs = report.get("costs")
    if costs:
        count, work, size = costs["parameters"], costs["multiply_adds_per_token"], costs["nbytes"]
        more = count / costs["model_parameters"]
        slower = work / costs["model_multiply_adds_per_token"]
        table.add_row("routed layers", str(costs["layers"]))
        table.add_row("adds", f"{count:,} parameters (+{more:.1%}), {format_bytes(size)}")
        table.add_row("per token", f"{work:,} multiply-adds (+{slower:.1%})")
    if "experts" in report:
        table.add_row("experts", escape(", ".join(report["experts"])))
        table.add_row("router", report["router"])
    if report.get("heads"):
        kinds = dict.fromkeys(report["heads"].values())
        table.add_row("heads", escape(f"of {', '.join(report['heads'])} ({', '.join(kinds)})"))
    if ranks := sorted(set(report.get("layers", {}).values())):
        table.add_row("rank", between(ranks[0], ranks[-1]))
    alike: dict[str, list[str]] = {}
    left_out: list[str] = report.get("left_out", [])
    for name in left_out:
        alike.setdefault(_why_left_out(name, left_out), []).append(name)
    for reason, names in alike.items():
        table.add_row("left out", escape(f"{few(names)}: {reason}"))
    if others := [name for name in report.get("not_routed", []) if name not in left_out]:
        count = counted(len(others), "matrix", "matrices")
        text = (
            f"{count}: merged only, whichever expert is chosen, at any rank; so are biases, norms "
        )
        table.add_row("not routed", text + "and tables (--layers GLOB routes others)")
    if report.get("short"):
        table.add_row(
            "note",
            f"{counted(len(report['short']), 'layer')} with experts of fewer directions than the "
            "rank: too few tokens, or nothing left to add",
        )
    out.print(table)
    _show_places(report)
    if quality is not None:
        show_quality(quality)
        tell_notes([note] if note else [])
    tell_done("written", report.get("output"))
    tell_done("written", report.get("export"))


def _show_places(report: Mapping[str, Any]) -> None:
    """Print which kinds of layers are routed and which are not, in the model's order."""
    from eutectic.routed.routed_layers import layer_kinds

    found = {key: layer_kinds(report.get(key, [])) for key in ("routed", "not_routed")}
    names = [*dict.fromkeys(name for kinds in found.values() for name in kinds)]
    if not names:
        return
    cells = {
        key: [str(found[key].get(name, "–")) for name in names] for key in ("routed", "not_routed")
    }
    columns = [("routed", cells["routed"]), ("not", cells["not_routed"])]
    out.print()
    print_named(names, [columns], title="matrices")


def show_quality(quality: RouterQuality) -> None:
    """Print shares of samples that are sent to their own expert: blocks and tasks, six across."""
    how = "on its own data" if quality.measured else "estimated from its statistics, layers alone"
    out.print()
    out.print(
        f"Samples sent to their own expert, {how} (by chance {quality.chance:.0%})", style="dim"
    )
    names, blocks = list(quality.samples), quality.blocks()
    rows = [*blocks, "decision" if quality.measured else "mean", "samples"]
    columns = [
        (
            name,
            [
                *(f"{shares[name]:.1%}" for shares in blocks.values()),
                f"{quality.decisions[name]:.1%}",
                f"{quality.samples[name]:,}",
            ],
        )
        for name in names
    ]
    styles = [*[None] * len(blocks), "bold", "dim"]
    print_named(rows, [[column] for column in columns], styles=styles)
