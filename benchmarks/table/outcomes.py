"""Which test examples a row gets right, kept beside its record, and how surely two rows differ."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from table.suite import percentages
from torch import Tensor

Right = Mapping[str, Tensor]


def keep(right: Right, results: Path, name: str) -> dict[str, float]:
    """Write a row's outcomes, task -> `[n]` bool, and return its accuracies in percent."""
    folder = results / "outcomes"
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{name}.partial"
    save_file({task: own.contiguous() for task, own in right.items()}, unfinished)
    unfinished.replace(folder / f"{name}.safetensors")
    return percentages(right)


def difference(one: Right, other: Right, experts: Right) -> tuple[float, float]:
    """Return the difference of two rows' shares of the experts, and its standard error, in percent.

    All three read the same examples, so each example counts by what it changes, (a − b − (A − B) e)
    over the expert's accuracy with A and B the shares: the linearised ratio, its variance over
    examples, tasks independent. Without `other`'s outcomes (zeros) it is the share itself.
    """
    value = variance = 0.0
    for task, right in experts.items():
        expert, gap = right.double(), one[task].double() - other[task].double()
        share = gap.mean() / expert.mean()
        each = (gap - share * expert) / expert.mean()
        value += share.item()
        variance += each.var().item() / len(each)
    return 100 * value / len(experts), 100 * variance**0.5 / len(experts)


def load_outcomes(results: Path) -> dict[str, dict[str, Tensor]]:
    """Read row -> task -> `[n]`, the mean over proxy samples; "row at α by KL" a row of its own."""
    samples: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
    for file in sorted((results / "outcomes").glob("*.safetensors")):
        row, _, kind = file.stem.partition("@")
        row = row if row in ("base", "experts") else row.rpartition("-")[0]
        samples[f"{row}@{kind}" if kind else row].append(load_file(file))
    return {
        row: {task: torch.stack([own[task].double() for own in found]).mean(0) for task in found[0]}
        for row, found in samples.items()
    }


def write_differences(results: Path) -> dict[str, float]:
    """Write `differences.json`, row -> other row -> [difference, standard error], both in percent.

    Returns row -> standard error of its own share. Rows without outcomes are left out.
    """
    rows = load_outcomes(results)
    if "experts" not in rows:
        return {}
    experts = rows.pop("experts")
    zero = {task: torch.zeros_like(own) for task, own in experts.items()}
    errors = {row: difference(right, zero, experts)[1] for row, right in rows.items()}
    lines = []
    for row, right in rows.items():
        pairs = {name: difference(right, other, experts) for name, other in rows.items()}
        rounded = {name: [round(v, 3) for v in pair] for name, pair in pairs.items() if name != row}
        lines.append(f"{json.dumps(row)}: {json.dumps(rounded)}")
    (results / "differences.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return errors
