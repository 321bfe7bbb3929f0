"""The table of a suite: base, experts, every static method at its best and at a label-free α,
and the routed models; accuracy with what each merge cost. Resumable: one JSON file per result.

    python benchmarks/table/run.py text --work DIR --regime hard --tasks 8 --seeds 3

α is searched on the validation split only (labelled); or without labels: by the divergence from the
experts on the proxy sample, which is drawn from their training texts, or (`held_out`) on texts that
they were not trained on, or in closed form from the Grams. Test data are read once per row and α.
A row that depends on the proxy sample is repeated for further samples at the α that validation
chose for the first. Results of other experts, or of other numbers of examples, are not mixed.

With `--executor ray` (`--ray-address HOST:PORT`) the workers of a Ray cluster measure the rows, a
core each, and this process shows them. Its machines see this folder and DIR under the same paths.
Accuracies are those of `--threads 1`; seconds are those of machines that do several rows at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from table import merging
from table.merging import (
    ALL_ROWS,
    MergedRow,
    Row,
    alignments,
    collect_statistics,
    known_rows,
    merge_row,
    set_weights,
)
from table.options import VALIDATION_TEXTS, parse, table_command
from table.outcomes import keep
from table.routing import routed_rows
from table.show import write_table
from table.spreading import Workers, collect, measure_rows
from table.suite import (
    SPLITS,
    Batches,
    Suite,
    accuracies,
    correct,
    logits,
    mean,
    normalised,
    outcomes,
    set_parameters,
)

from eutectic.statistics import load_statistics
from eutectic.tuning.divergence import kl_divergence
from eutectic.tuning.output_error import closed_form_scale, output_terms
from eutectic.tuning.search import Measured, ScaleCurve, search_scale

DIVERGENCE_PROXIES = 64


def load_suite(arguments: argparse.Namespace) -> Suite:
    """Import the suite that is asked for, and shorten its validation split."""
    sys.path[:0] = [str(HERE.parent / arguments.suite)]
    from suite import load_suite as load

    suite = load(arguments.work, arguments.regime, arguments.tasks)
    tested: int | None = getattr(arguments, "test_texts", None)
    chosen_on: int = getattr(arguments, "validation_texts", VALIDATION_TEXTS)
    splits = {
        task: {
            "validation": part_of(both["validation"], 0, chosen_on),
            "test": both["test"] if tested is None else part_of(both["test"], 0, tested),
            "held_out": part_of(both["validation"], chosen_on, DIVERGENCE_PROXIES),
        }
        for task, both in suite.splits.items()
    }
    return replace(suite, splits=splits)


def part_of(batches: Batches, start: int, count: int) -> Batches:
    """Return so many examples of a split from one on, in its own order."""
    keep = (batches.order >= start) & (batches.order < start + count)
    inputs, first = [], 0
    for batch in batches.inputs:
        size = len(next(iter(batch.values())))
        chosen = keep[first : first + size]
        if chosen.any():
            inputs.append({name: value[chosen] for name, value in batch.items()})
        first += size
    return Batches(inputs, batches.order[keep] - start, batches.labels[start : start + count])


def check_settings(suite: Suite, results: Path) -> None:
    """Refuse to add to results of other experts or of other numbers of examples."""
    found: dict[str, Any] = {
        f"{split}_examples": {task: len(own[split].labels) for task, own in suite.splits.items()}
        for split in SPLITS
    }
    found["experts"] = {}
    for task, folder in suite.experts.items():
        weights = (folder / "model.safetensors").read_bytes()
        found["experts"][task] = hashlib.sha256(weights).hexdigest()
    known = cached(results / "settings.json", lambda: found)
    for key, value in found.items():
        if known.get(key) != value:
            raise SystemExit(
                f"{results} holds results of other {key.replace('_', ' ')} than are asked for.\n"
                "Ask for the same, or move that folder away to measure anew."
            )


def cached(file: Path, compute: Callable[[], Any], parts: Iterable[str] = ()) -> Any:
    """Return the JSON of a file, computing and writing it first where it, or a part, is missing."""
    if not (file.is_file() and json.loads(file.read_text()).keys() >= set(parts)):
        value = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".partial")
        unfinished.write_text(json.dumps(value, indent=1) + "\n")
        unfinished.replace(file)
    return json.loads(file.read_text())


def fixed_models(suite: Suite, results: Path) -> dict[str, dict[str, float]]:
    """Test accuracy of the base and of every expert on its own task."""
    from safetensors.torch import load_file

    general: dict[str, dict[str, float]] = {}

    def of_base() -> dict[str, float]:
        set_weights(suite.model, load_file(suite.base / "model.safetensors"))
        general.update({} if suite.general is None else {"base": suite.general()})
        return keep(outcomes(suite, suite.model, "test"), results, "base")

    def of_experts() -> dict[str, float]:
        found: dict[str, Tensor] = {}
        for task, folder in suite.experts.items():
            set_weights(suite.model, load_file(folder / "model.safetensors"))
            found[task] = correct(suite, suite.model, task, "test")
            general.update({} if suite.general is None else {task: suite.general()})
        return keep(found, results, "experts")

    fixed = {
        "base": cached(results / "base.json", of_base),
        "experts": cached(results / "experts.json", of_experts),
    }
    if general:
        cached(results / "general.json", lambda: general, general)
    return fixed


def by_validation(suite: Suite, merged: MergedRow, start: float) -> ScaleCurve:
    """Labelled search: mean validation accuracy."""

    def objective(scale: float) -> Measured:
        set_parameters(suite.model, merged.base, merged.deltas, scale)
        values = accuracies(suite, suite.model, "validation")
        return Measured(mean(values), values)

    return _search(objective, start, maximise=True)


def by_divergence(
    suite: Suite, merged: MergedRow, start: float, inputs: Mapping[str, Batches]
) -> ScaleCurve:
    """Label-free search: mean KL from every expert's predictions on inputs of its own task."""
    from safetensors.torch import load_file

    wanted = {}
    for task, folder in suite.experts.items():
        set_weights(suite.model, load_file(folder / "model.safetensors"))
        wanted[task] = logits(suite, suite.model, task, inputs[task])

    def objective(scale: float) -> Measured:
        set_parameters(suite.model, merged.base, merged.deltas, scale)
        values = {
            task: kl_divergence(wanted[task], logits(suite, suite.model, task, inputs[task]))
            for task in suite.tasks
        }
        return Measured(mean(values), values)

    return _search(objective, start, maximise=False)


def _search(objective: Callable[[float], Measured], start: float, maximise: bool) -> ScaleCurve:
    """A factor of four to each side of a guess, and further if the best α is at an edge."""
    low, high = start / 4, start * 4
    curve = search_scale(objective, low=low, high=high, points=5, tolerance=0.12, maximise=maximise)
    if curve.at_edge:
        low, high = (low / 8, low * 1.5) if curve.scale < start else (high / 1.5, high * 8)
        curve = search_scale(
            objective, low=low, high=high, points=4, tolerance=0.12, maximise=maximise
        )
    return curve


def by_grams(suite: Suite, merged: MergedRow, files: Mapping[str, Path]) -> float:
    """The closed form from Grams, over all matrices."""
    from safetensors import safe_open

    statistics = [load_statistics(files[task]) for task in suite.tasks]
    opened = [safe_open(f / "model.safetensors", "pt") for f in suite.experts.values()]
    names = [
        name
        for name, delta in merged.deltas.items()
        if all(name in s and s[name].count for s in statistics)
        # Depthwise convolutions have a Gram for each channel.
        and (delta.ndim < 4 or delta.shape[1] > 1)
    ]

    def matrix(delta: Tensor) -> Tensor:
        return delta.flatten(1) if delta.ndim == 4 else delta

    def terms() -> Iterable[Any]:
        for name in names:
            own = [matrix(file.get_tensor(name) - merged.base[name]) for file in opened]
            yield output_terms(own, matrix(merged.deltas[name]), [s[name] for s in statistics])

    return closed_form_scale(terms()).scale


def initial_merge(row: Row, results: Path) -> tuple[str, float] | None:
    """Return method and chosen α of the row that a linear system begins with."""
    if row.init is None:
        return None
    chosen = json.loads((results / f"{row.init}-0.json").read_text())["scale"]
    return ALL_ROWS[row.init].method, chosen


def static_row(
    suite: Suite,
    name: str,
    work: Path,
    results: Path,
    seed: int,
    kinds: Sequence[str],
    aligned: bool,
) -> dict[str, Any]:
    """One static method for one proxy sample: what its record does not hold yet."""
    row, file = ALL_ROWS[name], results / f"{name}-{seed}.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if record and record["parameters"] != dict(row.parameters):
        raise SystemExit(f"{file}: measured with other parameters; move it away to measure anew.")
    init = initial_merge(row, results)
    reads = "grams" in kinds or row.needs_statistics
    files = collect_statistics(suite, work, seed, **row.statistics) if reads else {}
    merged = merge_row(suite, row, work, seed, files if row.needs_statistics else None, init)
    if aligned:
        cached(results / "alignment" / f"{name}.json", lambda: alignments(suite, merged))

    def test(scale: float, kind: str = "") -> dict[str, float]:
        set_parameters(suite.model, merged.base, merged.deltas, scale)
        return keep(outcomes(suite, suite.model, "test"), results, f"{name}-{seed}{kind}")

    if "test" not in record:
        record |= _labelled(suite, row, merged, results / f"{name}-0.json", seed)
        record["test"] = test(record["scale"])
        if suite.general is not None:
            record["general"] = suite.general()
        if row.init is not None and record["scale"] != 1:
            record["test_at_one"] = test(1.0, "@one")
        record |= {"row": name, "seed": seed}
    for kind in (kind for kind in kinds if kind not in record):
        if kind == "grams":
            closed = by_grams(suite, merged, files)
            record[kind] = {"scale": closed, "test": test(closed, "@grams")}
            continue
        if kind == "held_out":
            inputs = {task: own["held_out"] for task, own in suite.splits.items()}
        else:
            inputs = {task: suite.proxies(task, seed, DIVERGENCE_PROXIES) for task in suite.tasks}
        curve = by_divergence(suite, merged, row.start, inputs)
        record[kind] = {
            "scale": curve.scale,
            "curve": curve.as_record(),
            "test": test(curve.scale, f"@{kind}"),
        }
    return record


def _labelled(suite: Suite, row: Row, merged: MergedRow, first: Path, seed: int) -> dict[str, Any]:
    """The merge's cost and its α: searched for the first sample, which others take over."""
    record: dict[str, Any] = {
        "parameters": dict(row.parameters),
        "seconds": merged.seconds,
        "peak_bytes": merged.peak_bytes,
        "scale": 1.0,
    }
    lost = [own["adapter"] for own in merged.records.values() if "adapter" in own]
    for key in ("lost_energy", "lost_before"):
        values = [own[key] for own in lost if key in own]
        record |= {key: sum(values) / len(values)} if values else {}
    if row.scale_of is not None:
        first = first.with_name(f"{row.scale_of}-0.json")
    if seed or row.scale_of is not None:
        return record | {"scale": json.loads(first.read_text())["scale"]}
    if not row.fixed:
        curve = by_validation(suite, merged, row.start)
        record |= {"scale": curve.scale, "curve": curve.as_record()}
    return record


def asked_rows(asked: Sequence[str] | None, suite: Suite) -> list[str]:
    """Return the rows that are asked for, by default all that the suite has; refuse others."""
    has = [*known_rows(bool(suite.adapters), suite.convolutions)]
    has += [] if suite.convolutions else ["routed"]  # nothing there is routed
    if lacking := [name for name in asked or () if name not in has]:
        raise SystemExit(f"{suite.name} has no row {', '.join(lacking)}; it has {', '.join(has)}.")
    return has if asked is None else list(asked)


def spread_rows(arguments: argparse.Namespace, suite: Suite, workers: Workers) -> None:
    """Have the workers of a cluster measure what is asked for, a command each."""
    known = known_rows(bool(suite.adapters), suite.convolutions)
    rows = asked_rows(arguments.rows, suite)
    own = [known[name] for name in rows if name in known]
    grams = "grams" in arguments.label_free and not all(row.fixed for row in own)
    table = table_command(arguments)
    if grams or "routed" in rows or any(row.needs_statistics for row in own):
        collect(workers, table, rows, suite.tasks)
    measure_rows(workers, table, rows, arguments.bases)


def collect_parts(arguments: argparse.Namespace, suite: Suite) -> None:
    """Collect the statistics of some tasks that the rows of the table read."""
    own = {task: folder for task, folder in suite.experts.items() if task in arguments.collect}
    part = replace(suite, experts=own)
    names = arguments.rows if arguments.rows is not None else list(ALL_ROWS)
    rows = [ALL_ROWS[name] for name in names if name in ALL_ROWS]
    routed = [{}] if "routed" in names else []
    kinds = [*routed, *(row.statistics for row in rows if suite.adapters or not row.core)]
    for seed, kind in product(range(arguments.seeds), kinds):
        collect_statistics(part, arguments.work, seed, **kind)


def main() -> None:
    """Fill what is missing and write the table."""
    arguments, workers = parse()
    torch.set_num_threads(arguments.threads)
    merging.apart = not arguments.in_process
    suite = load_suite(arguments)
    if "held_out" in arguments.label_free:
        lacking = [task for task, own in suite.splits.items() if not len(own["held_out"].labels)]
        if lacking:
            raise SystemExit(f"No validation data are left to be held out: {', '.join(lacking)}.")
    if arguments.collect is not None:
        collect_parts(arguments, suite)
        return
    chosen = asked_rows(arguments.rows, suite)
    results = arguments.work / "results" / suite.name
    check_settings(suite, results)
    fixed = fixed_models(suite, results)
    print(f"base {mean(fixed['base']):.1f}, experts {mean(fixed['experts']):.1f}", flush=True)
    if workers is not None:
        spread_rows(arguments, suite, workers)
    known = known_rows(bool(suite.adapters), suite.convolutions)
    for name in (n for n in known if n in chosen):
        for seed in range(arguments.seeds if known[name].seeded else 1):
            start = time.monotonic()
            file = results / f"{name}-{seed}.json"
            kinds = () if seed or known[name].fixed else tuple(arguments.label_free)
            if known[name].core:  # whose Grams are those of the core
                kinds = tuple(kind for kind in kinds if kind != "grams")
            aligned = seed == 0 and not arguments.no_alignment
            compute = partial(
                static_row, suite, name, arguments.work, results, seed, kinds, aligned
            )
            row = cached(file, compute, kinds)
            share = normalised(row["test"], fixed["experts"])
            print(
                f"{name} {seed}: α {row['scale']:.3g}, {mean(row['test']):.1f}, {share:.1f} % "
                f"({time.monotonic() - start:.0f} s)",
                flush=True,
            )
    if "routed" in chosen:
        lacking = set(arguments.routed or ())
        for seed in range(arguments.seeds):
            for name, compute in routed_rows(
                suite, arguments.work, results, seed, arguments.counts, arguments.bases
            ):
                if arguments.routed and name not in arguments.routed:
                    continue
                lacking.discard(name)
                row = cached(results / f"{name}-{seed}.json", compute)
                share = normalised(row["test"], fixed["experts"])
                print(f"{name} {seed}: {mean(row['test']):.1f}, {share:.1f} %", flush=True)
        if lacking:
            raise SystemExit(f"These bases have no routed row {', '.join(sorted(lacking))}.")
    print(write_table(results))


if __name__ == "__main__":
    main()
