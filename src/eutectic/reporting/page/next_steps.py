"""What to try next, with the command, by what a report shows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from eutectic.methods import all_methods
from eutectic.reporting.page.findings import FAIR, POOR, WEAK, finding, named
from eutectic.reporting.page.page_record import Curve, Finding, Merge, Scores
from eutectic.words import few, percent


def what_next(
    scores: Sequence[Scores],
    merges: Sequence[Merge],
    curves: Sequence[Curve],
    rest: Mapping[str, Any],
) -> Iterator[Finding]:
    """Yield what to try next; `rest` as in `verdict`."""
    wider: dict[tuple[str, str], list[str]] = {}
    for curve in curves:
        if curve.at_edge:
            low, high = curve.points[0].scale, curve.points[-1].scale
            over = "" if curve.symbol == "α" else f" --over {shlex.quote(curve.symbol)}"
            beyond = f"{low / 10:g}:{low:g}" if curve.chosen == low else f"{high:g}:{10 * high:g}"
            command = f"eutectic tune recipe.yaml{over} --range {beyond}"
            wider.setdefault((curve.symbol, command), []).append(curve.name)
    for (symbol, command), names in wider.items():
        yield _next("widen", f"Search {symbol} of {few(names)} beyond the edge.", command)
    exploded = [m for m in merges if m.growth and m.bound and m.growth > m.bound]
    if exploded:
        yield _next("smaller", f"Choose a smaller α for {few([m.name for m in exploded])}.",
                    "eutectic merge recipe.yaml --scale norm -o merged/")  # fmt: skip
    if any(m.planned for m in merges):
        yield _next("merge", "Carry the plan out.",
                    "eutectic merge recipe.yaml -o merged/ --report")  # fmt: skip
    done = [m for m in merges if not m.planned]
    if not scores and done:
        yield _next("evaluate", "Nobody has measured the model yet: score it, the base and the "
                    "experts on rows that nothing was chosen on.",
                    "eutectic evaluate merged/ --tasks tasks.yaml --base BASE -e NAME=EXPERT "
                    "-o results.json")  # fmt: skip
    searched = {curve.name for curve in curves} | {name for name, _ in rest["closed"]}
    calibrated = any(merge.calibrated for merge in merges)
    for own in scores:
        yield from _next_of_scores(own, rest, searched, calibrated)
    weak = [r for r in rest["routing"] if r.decisions and r.chance is not None
            and min(r.decisions.values()) < r.chance + WEAK * (1 - r.chance)]  # fmt: skip
    if blind := [r.name for r in weak if not r.measured]:
        yield _next("router", f"Give the routers statistics of the merged model itself "
                    f"({few(blind)}): they are what routing sees.",
                    "eutectic route MERGED … --router-data NAME=FILE")  # fmt: skip
    if seen := [r.name for r in weak if r.measured]:
        yield _next("oracle", f"Give the routers more inputs of each task ({few(seen)}), or where "
                    "a request's task is known name its expert: "
                    "`eutectic.routing(model, mode=\"oracle\", expert=NAME)`.", "")  # fmt: skip
    if done and not curves and not exploded and not scores:
        yield _next("tune", "Nothing chose α here: search it, without labels if you have none.",
                    "eutectic tune recipe.yaml --search divergence --tasks tasks.yaml")  # fmt: skip


def _next_of_scores(
    own: Scores, rest: Mapping[str, Any], searched: Collection[str], calibrated: bool
) -> Iterator[Finding]:
    best = named(own, own.best) if own.best else None
    if best is None:
        yield _next("compare", "Merge, and compare methods on the same rows.",
                    "eutectic compare recipe.yaml --tasks tasks.yaml -o comparison/")  # fmt: skip
        return
    mine = [s for s in own.scores if s.model == best.name and s.share.value is not None]
    poor = [s.task for s in mine if s.share.value is not None and s.share.value < POOR]
    if poor and not rest["routing"]:
        yield _next("route", f"{best.name} lost more than {percent(1 - POOR)} of the expert on "
                    f"{few(poor)}: thin experts beside the merge, chosen per input, keep such "
                    "tasks.",
                    "eutectic route MERGED NAME=EXPERT… -s NAME=FILE… -o routed/")  # fmt: skip
    data = rest["statistics"] or any(_needs_data(m.name) for m in own.models)
    if best.share.value is not None and best.share.value < FAIR and not data:
        text = (
            "A few unlabelled inputs a task allow methods that use data (iso_a, regmean, esm), "
            "which usually gain where merges without data stop."
        )
        command = "eutectic collect EXPERT --data inputs.jsonl -o NAME.stats.safetensors"
        yield _next("collect", text, command)
    routed = {routing.name for routing in rest["routing"]}
    if best.name not in {*searched, *routed} and not best.note:
        yield _next("tune_best", f"Nothing here chose the α of {best.name}: search it on rows that "
                    "are not scored, or without labels.",
                    "eutectic tune recipe.yaml --search divergence --tasks tasks.yaml")  # fmt: skip
    if best.share.value is not None and best.share.value < FAIR and data:
        if not calibrated and best.name not in routed:
            yield _next("calibrate", f"Calibrate {best.name} layer by layer towards its experts: "
                        "in closed form, from the same unlabelled inputs.",
                        "eutectic calibrate MERGED NAME=EXPERT… --data NAME=inputs.jsonl "
                        "-o calibrated/")  # fmt: skip
    level = [m for m in own.models if m.level]
    if len(level) > 1:
        rows = min((task.rows for task in own.tasks), default=0)
        yield _next("rows", f"More test rows tell the {len(level) + 1} models apart that are level "
                    f"now; the smallest task has {rows:,}. Four times as many halve an interval.",
                    "")  # fmt: skip


def _needs_data(model: str) -> bool:
    """Tell whether a model has the name of a method that reads statistics, α and the like aside."""
    method = all_methods().get(re.split("[@: -]", model)[0])
    return method is not None and bool(method.needs(method.parse({})) - {"base"})


def _next(kind: str, text: str, command: str) -> Finding:
    return finding(kind, "next", text, command=command)
