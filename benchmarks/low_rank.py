"""Methods that read input Grams, from few directions of each against the whole.

    python benchmarks/text/experts.py --work DIR --regime hard --task …     # experts
    python benchmarks/low_rank.py text --work DIR --tasks wn_noun,wn_verb,… --output FILE.json
    python benchmarks/low_rank.py glyphs --work DIR --output FILE.json

Every variant merges the same experts from files to files, α is chosen on validation examples, and
all variants read the same test examples: the error beside a difference is that of paired ones.
`file` variants read statistics that were collected with `--rank`, the others whole Grams.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from table.merging import set_weights
from table.run import VALIDATION_TEXTS, part_of
from table.suite import Suite, correct, set_parameters

import eutectic

PROXIES = 128
SCALES = (0.3, 0.5, 0.7, 1.0)
Rank = int | Literal["auto"]


@dataclass(frozen=True)
class Variant:
    """A way to merge.

    Attributes:
        method: its name.
        parameters: of the method.
        rank: of the statistics files; None for whole Grams.
    """

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    rank: Rank | None = None


RANKS: tuple[Rank, ...] = (16, 64, 256, "auto")
VARIANTS: dict[str, Variant] = {
    "iso_c": Variant("iso_c"),
    "iso_a": Variant("iso_a", {"metric_rank": "full"}),
    "iso_a-default": Variant("iso_a"),
    **{
        f"iso_a-even-{k}": Variant("iso_a", {"metric_rank": k, "metric_degree": 0})
        for k in (16, 64, 256)
    },
    **{f"iso_a-file-{k}": Variant("iso_a", {}, k) for k in RANKS},
    "esm": Variant("esm", {"preset": "roberta"}),
    **{f"esm-file-{k}": Variant("esm", {"preset": "roberta"}, k) for k in RANKS},
    "regmean": Variant("regmean"),
    **{f"regmean-file-{k}": Variant("regmean", {}, k) for k in RANKS},
    "mats": Variant("mats", {"iterations": 10}),
    **{f"mats-file-{k}": Variant("mats", {"iterations": 10}, k) for k in RANKS},
}
COLUMNS = ("scale", "seconds", "cpu_seconds", "statistics_bytes")


def statistics(suite: Suite, work: Path, rank: Rank | None) -> dict[str, Path]:
    """Collect every expert's Grams, whole or of few directions, once."""
    files: dict[str, Path] = {}
    for task, folder in suite.experts.items():
        file = work / "statistics" / f"low-rank-{rank or 'whole'}" / f"{task}.safetensors"
        files[task] = file
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            set_weights(suite.model, load_file(folder / "model.safetensors"))
            inputs = suite.proxies(task, 0, PROXIES).inputs
            eutectic.collect(suite.model, inputs, file, layers=suite.layers, rank=rank)
    return files


def merged(suite: Suite, variant: Variant, work: Path) -> tuple[dict[str, Tensor], float, int]:
    """Return the deltas at α = 1, CPU seconds of the merge and bytes of the statistics."""
    experts: dict[str, dict[str, str]] = {t: {"path": str(f)} for t, f in suite.experts.items()}
    size = 0
    if variant.method != "iso_c":
        for task, file in statistics(suite, work, variant.rank).items():
            experts[task]["statistics"] = str(file)
            size += file.stat().st_size
    recipe = {
        "base": str(suite.base),
        "experts": experts,
        "method": variant.method,
        "parameters": dict(variant.parameters),
        "scale": 1.0,
        "dtype": "float32",
    }
    with TemporaryDirectory() as folder:
        start = time.process_time()
        eutectic.merge(recipe, output=Path(folder) / "out", threads=2)
        seconds = time.process_time() - start
        base = load_file(suite.base / "model.safetensors")
        whole = load_file(Path(folder) / "out" / "model.safetensors")
    names = {name for name, _ in suite.model.named_parameters()}
    deltas = {n: whole[n] - base[n] for n in names if not torch.equal(whole[n], base[n])}
    return deltas, seconds, size


def measure(suite: Suite, variant: Variant, work: Path, scales: Sequence[float]) -> dict[str, Any]:
    """Merge, choose α on validation texts and return which test texts are right."""
    deltas, seconds, size = merged(suite, variant, work)
    base = load_file(suite.base / "model.safetensors")
    found: dict[float, float] = {}
    for scale in scales:
        set_parameters(suite.model, base, deltas, scale)
        right = [correct(suite, suite.model, t, "validation") for t in suite.tasks]
        found[scale] = sum(float(own.double().mean()) for own in right) / len(right)
    scale = max(found, key=lambda s: found[s])
    set_parameters(suite.model, base, deltas, scale)
    outcomes = {t: correct(suite, suite.model, t, "test").int().tolist() for t in suite.tasks}
    return {
        "scale": scale,
        "validation": found,
        "cpu_seconds": round(seconds, 2),
        "statistics_bytes": size,
        "outcomes": outcomes,
    }


def shares(outcomes: Mapping[str, Sequence[int]], experts: Mapping[str, float]) -> list[Tensor]:
    """Return, task by task, every text's part of the share of the experts, in percent."""
    return [100 * torch.tensor(own).double() / experts[t] for t, own in outcomes.items()]


def difference(one: list[Tensor], other: list[Tensor]) -> tuple[float, float]:
    """Return the difference of the mean shares, and its standard error over paired texts."""
    parts = [a - b for a, b in zip(one, other, strict=True)]
    mean = sum(float(p.mean()) for p in parts) / len(parts)
    error = sum(float(p.var()) / len(p) for p in parts) ** 0.5 / len(parts)
    return mean, error


def opened(name: str, work: Path, tasks: Sequence[str]) -> Suite:
    """Return the hard regime of a suite, of some tasks or its first eight."""
    sys.path.insert(0, str(HERE / name))
    module = importlib.import_module("suite")
    if tasks == [""]:
        return module.load_suite(work, "hard", 8)
    if name != "text":
        raise SystemExit("Only the text suite takes --tasks; the others have their first eight.")
    module.named_tasks = lambda count: tuple(tasks)
    return module.load_suite(work, "hard", len(tasks))


def main() -> None:
    """Measure what is asked for and not there yet, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", choices=("text", "glyphs"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tasks", help="names of experts, with commas; default: the first eight")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--texts", type=int, default=500, help="test examples of a task")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="α, one: no choice")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    suite = opened(options.suite, options.work, (options.tasks or "").split(","))
    tasks = suite.tasks
    suite = replace(
        suite,
        splits={
            task: {
                "validation": part_of(both["validation"], 0, VALIDATION_TEXTS),
                "test": part_of(both["test"], 0, options.texts),
            }
            for task, both in suite.splits.items()
        },
    )
    kept: dict[str, Any] = {}
    if options.output.is_file():
        old = json.loads(options.output.read_text("utf-8"))
        kept = old["raw"] if old["tasks"] == list(tasks) else {}
    experts: dict[str, list[int]] = kept.get("experts", {})
    if not experts:
        for task, folder in suite.experts.items():
            set_weights(suite.model, load_file(folder / "model.safetensors"))
            experts[task] = correct(suite, suite.model, task, "test").int().tolist()
        kept["experts"] = experts
    for name in options.variants.split(","):
        if name not in kept:
            kept[name] = measure(suite, VARIANTS[name], options.work, options.scales)
            write(options.output, tasks, kept)
            print(name, json.dumps(rows(kept)[name]), flush=True)


def rows(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table: share of the experts, and the difference from the whole Gram's."""
    experts = {t: sum(own) / len(own) for t, own in kept["experts"].items()}
    found: dict[str, Any] = {}
    for name, one in kept.items():
        if name == "experts":
            continue
        own = shares(one["outcomes"], experts)
        share = sum(float(p.mean()) for p in own) / len(own)
        row = {
            "share": round(share, 2),
            **{k: one[k] for k in COLUMNS if k in one},
        }
        whole = name.split("-")[0]
        if whole in kept and whole != name:
            mean, error = difference(own, shares(kept[whole]["outcomes"], experts))
            row |= {"difference": round(mean, 2), "error": round(error, 2)}
        found[name] = row
    return found


def write(path: Path, tasks: Sequence[str], kept: Mapping[str, Any]) -> None:
    """Write the table beside what it was made of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"tasks": list(tasks), "rows": rows(kept), "raw": dict(kept)}
    path.write_text(json.dumps(content) + "\n", "utf-8")


if __name__ == "__main__":
    main()
