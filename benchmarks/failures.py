"""What merging does where it is at its worst: odd experts among eight of the text suite.

    python benchmarks/failures.py --work DIR --output FILE.json           # trains too; resumable

Every case is merged by ten methods, at the best of four α on 50 validation texts a task and at the
method's default, and Iso-A is routed too at its best α; 120 test texts a task. What odd experts
do to the *others* is the paired difference from the merge of eight ordinary experts, over the tasks
that both have. Few texts: they tell failures from none, not neighbouring methods.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "text")]

from bases import MINILM
from experts import Shuffled, make_expert, recipe_of
from safetensors.torch import load_file
from sources import first_tasks
from suite import suite_of
from table import merging
from table.merging import ROWS, MergedRow, collect_on, merge_row, set_weights
from table.outcomes import difference
from table.run import cached, part_of
from table.suite import (
    Batches,
    Suite,
    accuracies,
    correct,
    mean,
    normalised,
    outcomes,
    percentages,
    set_parameters,
)

import eutectic
from eutectic.methods.registry import get_method
from eutectic.statistics import load_statistics
from eutectic.types import Statistics

METHODS = (
    "average",
    "task_arithmetic",
    "ties",
    "tsv_m",
    "iso_c",
    "iso_cts",
    "regmean",
    "esm_roberta",
    "iso_a",
    "iso_regmean",
)
ROUTED, RANK = "iso_a_routed", 32
PROXIES, TESTED, CHOSEN_ON = 128, 120, 50
TRIED = (0.15, 0.35, 0.7, 1.2)  # of where a row's own search for α would begin
SAID = {
    "ordinary": "eight ordinary",
    "far": "one far",
    "near": "one near",
    "twice": "one twice",
    "noise": "one of noise",
    "base": "the base",
    "lora": "four by LoRA",
    "twenty": "ten full, ten by LoRA",
}


@dataclass(frozen=True)
class Case:
    """Which experts are merged.

    Attributes:
        experts: name -> folder below the work folder.
        odd: the tasks whose own expert is not the ordinary one.
        texts: name of an expert without a task of its own -> the task whose texts it is given.
    """

    experts: Mapping[str, str]
    odd: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that are measured: those of the experts."""
        return tuple(name for name in self.experts if name not in self.texts)


def cases() -> dict[str, Case]:
    """Return every case, by name."""
    tasks, twenty = first_tasks(8), first_tasks(20)
    hard = {task: f"hard/{task}" for task in tasks}
    by_lora = tasks[::2]
    return {
        "ordinary": Case(hard),
        # Four times the learning rate, and a quarter of it.
        "far": Case(hard | {"langid": "hard-fast/langid"}, ("langid",)),
        "near": Case(hard | {"langid": "kind/langid"}, ("langid",)),
        # The same task and recipe, another seed: one task has two experts.
        "twice": Case(hard | {"again": "hard-seed-1/wn_verb"}, ("wn_verb",), {"again": "wn_verb"}),
        # Labels exchanged at random, of texts that no other expert has.
        "noise": Case(hard | {"noise": "noise/wn_pos"}, (), {"noise": "wn_pos"}),
        "base": Case(hard | {"untrained": "base/untrained"}, (), {"untrained": "20news"}),
        "lora": Case(hard | {task: f"lora/{task}" for task in by_lora}, by_lora),
        "twenty": Case(
            {task: f"hard/{task}" for task in twenty[:10]}
            | {task: f"lora/{task}" for task in twenty[10:]},
            twenty[10:],
        ),
    }


def train(work: Path, asked: Iterable[Case]) -> None:
    """Make the experts of the cases that are asked for, where they are not there yet."""
    hard = recipe_of("hard", MINILM)
    recipes = {
        "hard-fast": replace(hard, learning_rate=4 * hard.learning_rate),
        "hard-seed-1": replace(hard, seed=1),
        "noise": Shuffled(**asdict(hard)),
    } | {regime: recipe_of(regime, MINILM) for regime in ("hard", "kind", "lora")}
    for folder in (work / place for case in asked for place in case.experts.values()):
        if folder.is_dir():
            continue
        if folder.parent.name == "base":
            shutil.copytree(MINILM.find(work / "cache"), folder)
        else:
            make_expert(folder.name, folder.parent.name, work, recipes[folder.parent.name], MINILM)


def suites(work: Path, asked: Mapping[str, Case]) -> dict[str, Suite]:
    """Return the suite that each case is measured on, read once for cases of the same tasks."""
    found: dict[tuple[str, ...], Suite] = {}
    for case in asked.values():
        if case.tasks not in found:
            trained = {task: work / case.experts[task] for task in case.tasks}
            found[case.tasks] = short(suite_of("failures", work, trained))
    return {name: found[case.tasks] for name, case in asked.items()}


def short(suite: Suite) -> Suite:
    """Return the suite with fewer examples."""
    splits = {
        task: {
            "validation": part_of(own["validation"], 0, CHOSEN_ON),
            "test": part_of(own["test"], 0, TESTED),
        }
        for task, own in suite.splits.items()
    }
    return replace(suite, splits=splits)


def arranged(suite: Suite, case: Case, work: Path) -> Suite:
    """Return the suite whose tasks are measured, with the case's experts of them."""
    dense: dict[str, Path] = {}
    adapters: dict[str, Path] = {}
    for name, place in case.experts.items():
        dense[name] = work / place
        if (work / place / "adapter_config.json").is_file():
            adapters[name] = work / place
            dense[name] = folder = work / f"{Path(place).parent}-dense" / name
            if not folder.is_dir():
                one = {name: work / place}
                eutectic.merge(
                    base=suite.base, experts=one, method="task_arithmetic", scale=1, output=folder
                )
    return replace(suite, experts=dense, adapters=adapters)


def grams(
    suite: Suite, case: Case, work: Path, proxies: Callable[[str], Batches]
) -> dict[str, Path]:
    """Collect the input Grams of every expert on texts of its own task."""
    files: dict[str, Path] = {}
    for name, folder in suite.experts.items():
        kept = work / "statistics" / f"grams-{folder.parent.name}"
        files[name] = file = kept / f"{name}.safetensors"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            set_weights(suite.model, load_file(folder / "model.safetensors"))
            task = case.texts.get(name, name)
            collect_on(suite, task, proxies(task), file, gradients=False)
    return files


def measured(suite: Suite, tasks: tuple[str, ...]) -> Suite:
    """Return the suite of those experts alone that have a task."""
    return replace(suite, experts={task: suite.experts[task] for task in tasks})


def save(right: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return outcomes as they are written: 1 where an example is right."""
    return {task: own.int().tolist() for task, own in right.items()}


def best_scale(suite: Suite, merged: MergedRow, start: float) -> float:
    """Return the α of those tried with the best mean accuracy on validation texts."""

    def found(scale: float) -> float:
        set_parameters(suite.model, merged.base, merged.deltas, scale)
        return mean(accuracies(suite, suite.model, "validation"))

    return max((share * start for share in TRIED), key=found)


def static(
    suite: Suite, tasks: tuple[str, ...], method: str, work: Path, files: Mapping[str, Path]
) -> dict[str, Any]:
    """One method: its outcomes at the α of validation and at its default."""
    row = ROWS[method]
    merged = merge_row(suite, row, work, 0, files if row.needs_statistics else None)
    own = measured(suite, tasks)

    def test(scale: float) -> dict[str, list[int]]:
        set_parameters(suite.model, merged.base, merged.deltas, scale)
        return save(outcomes(own, suite.model, "test"))

    default = get_method(row.method).default_scale(len(suite.experts))
    chosen = default if row.fixed else best_scale(own, merged, row.start)
    at_default = test(default)
    return {
        "scale": chosen,
        "default": default,
        "test": at_default if chosen == default else test(chosen),
        "at_default": at_default,
    }


def routed(
    suite: Suite,
    case: Case,
    tasks: tuple[str, ...],
    work: Path,
    files: Mapping[str, Path],
    scale: float,
    proxies: Callable[[str], Batches],
) -> dict[str, Any]:
    """Iso-A with thin experts beside it and a discriminant router, at the α chosen for Iso-A."""
    merged = merge_row(suite, ROWS["iso_a"], work, 0, files)
    set_parameters(suite.model, merged.base, merged.deltas, scale)
    seen: dict[str, Statistics] = {}
    for name in suite.experts:
        # One file each: they are read when they are needed, not before.
        file = work / "statistics" / f"failures-merged-{name}.safetensors"
        file.unlink(missing_ok=True)
        task = case.texts.get(name, name)
        collect_on(suite, task, proxies(task), file, gradients=False)
        seen[name] = load_statistics(file)
    model = eutectic.build_routed(
        suite.model,
        experts={n: load_file(f / "model.safetensors") for n, f in suite.experts.items()},
        statistics={name: load_statistics(own) for name, own in files.items()},
        router_statistics=seen,
        rank=RANK,
        router="discriminant",
    )
    found = {task: correct(suite, model, task, "test") for task in tasks}
    return {"scale": scale, "test": save(found)}


def measure(suite: Suite, work: Path, name: str, case: Case, method: str) -> None:
    """Measure one method on one case."""
    tasks = suite.tasks
    results = work / "failures" / name
    own = arranged(suite, case, work)

    def proxies(task: str) -> Batches:
        return suite.proxies(task, 0, PROXIES)

    def experts() -> dict[str, list[int]]:
        found: dict[str, Tensor] = {}
        for task in tasks:
            set_weights(suite.model, load_file(own.experts[task] / "model.safetensors"))
            found[task] = correct(suite, suite.model, task, "test")
        return save(found)

    def compute() -> dict[str, Any]:
        reads = method == ROUTED or ROWS[method].needs_statistics
        files = grams(own, case, work, proxies) if reads else {}
        if method != ROUTED:
            return static(own, tasks, method, work, files)
        scale = json.loads((results / "iso_a.json").read_text())["scale"]
        return routed(own, case, tasks, work, files, scale, proxies)

    cached(results / "experts.json", experts)
    row = cached(results / f"{method}.json", compute)
    print(name, method, f"α {row['scale']:.3g}, {time.process_time():.0f} s", flush=True)


def right(saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read outcomes."""
    return {task: torch.tensor(own, dtype=torch.float64) for task, own in saved.items()}


def summary(work: Path, known: Mapping[str, Case]) -> dict[str, Any]:
    """Return case -> method -> share of the experts, on the odd tasks, and the others' change."""
    folder = work / "failures"

    def read(case: str, method: str) -> dict[str, Any] | None:
        file = folder / case / f"{method}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    ordinary = right(read("ordinary", "experts") or {})
    tasks = known["ordinary"].tasks
    found: dict[str, Any] = {}
    for name, case in known.items():
        own = read(name, "experts")
        if own is None:
            continue
        experts = right(own)
        others = [task for task in tasks if task not in case.odd]
        found[name] = {"experts": percentages(experts), "methods": {}}
        for method in (*METHODS, ROUTED):
            row, control = read(name, method), read("ordinary", method)
            if row is None or control is None:
                continue
            entry: dict[str, Any] = {"scale": row["scale"], "default_scale": row.get("default")}
            for key in ("test", "at_default") if "default" in row else ("test",):
                mine, theirs = right(row[key]), right(control[key])
                odd = [task for task in case.odd if task in mine]
                shares = percentages(mine)
                held = percentages(experts)
                entry[key] = {
                    "share": normalised(shares, held),
                    "odd": normalised({t: shares[t] for t in odd}, held) if odd else None,
                    "others": difference(
                        {t: mine[t] for t in others},
                        {t: theirs[t] for t in others},
                        {t: ordinary[t] for t in others},
                    ),
                }
            found[name]["methods"][method] = entry
    return found


def table(found: Mapping[str, Any], key: str) -> str:
    """Return a table of methods by cases: the odd tasks' share; the others' change and error."""
    names = [name for name in SAID if name in found]
    lines = [
        "| | " + " | ".join(SAID[name] for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for method in (*METHODS, ROUTED):
        cells: list[str] = []
        for name in names:
            entry = found[name]["methods"].get(method)
            if entry is None or key not in entry:
                cells.append(" ")
            elif name == "ordinary":
                cells.append(f"{entry[key]['share']:.1f}")
            else:
                change, error = entry[key]["others"]
                odd = entry[key]["odd"]
                text = f"{change:+.1f} ± {error:.1f}".replace("-", "−")
                cells.append(text if odd is None else f"{odd:.0f}; {text}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, measure and print what is missing."""
    parser = argparse.ArgumentParser(description="Odd experts among ordinary ones.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the text suite")
    parser.add_argument("--case", action="append", choices=list(SAID), help="default: all")
    parser.add_argument("--method", action="append", choices=[*METHODS, ROUTED])
    parser.add_argument("--output", type=Path, help="file of all results")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    merging.apart = False
    known = cases()
    asked = {name: known[name] for name in arguments.case or known}
    train(arguments.work, asked.values())
    found_suites = suites(arguments.work, asked)
    for method in arguments.method or (*METHODS, ROUTED):
        for name, case in asked.items():
            measure(found_suites[name], arguments.work, name, case, method)
    found = summary(arguments.work, known)
    for key in ("test", "at_default"):
        print(f"\n{key}\n{table(found, key)}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
