"""What limits a merge of convolutions: the merge where one kind of tensor is each expert's own.

    python benchmarks/emoji/own.py --work DIR --output FILE.json [--row iso_a_convolutions]

Takes the α of that row from the table, which is measured first. A difference to the row has the
standard error over the same test pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch
from safetensors.torch import load_file
from suite import load_suite
from table import merging
from table.merging import CONVOLUTION_ROWS, collect_statistics, merge_row, set_weights
from table.options import TEST_EXAMPLES
from table.outcomes import difference
from table.run import part_of
from table.suite import Suite, correct
from torch import Tensor

OWN = ("pointwise", "depthwise", "norm", "depthwise+norm", "pointwise+norm", "pointwise+depthwise")


def kind(weight: Tensor) -> str:
    """Return what a parameter is; the stem's kernels, of every channel, count as pointwise."""
    if weight.ndim == 1:
        return "norm"
    return "depthwise" if weight.shape[1] == 1 else "pointwise"


def measured(suite: Suite, merged: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Return task -> which test pictures are right where tensors of some kinds are the expert's."""
    found: dict[str, Tensor] = {}
    for task, folder in suite.experts.items():
        expert = load_file(folder / "model.safetensors")
        mixed = {n: expert[n] if kind(w) in own else w for n, w in merged.items()}
        set_weights(suite.model, mixed)
        found[task] = correct(suite, suite.model, task, "test")
    return found


def main() -> None:
    """Merge once, then exchange kinds of tensors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--row", choices=CONVOLUTION_ROWS, default="iso_a_convolutions")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    merging.apart = False
    suite = load_suite(asked.work, "hard", asked.tasks)
    splits = {
        task: {"test": part_of(own["test"], 0, TEST_EXAMPLES["emoji"])}
        for task, own in suite.splits.items()
    }
    suite = replace(suite, splits=splits)
    results = asked.work / "results" / suite.name
    scale = json.loads((results / f"{asked.row}-0.json").read_text("utf-8"))["scale"]
    row = CONVOLUTION_ROWS[asked.row]
    files = collect_statistics(suite, asked.work, 0) if row.needs_statistics else None
    found = merge_row(suite, row, asked.work, 0, files)
    merged = {
        name: found.base[name] + scale * found.deltas[name] if name in found.deltas
        else found.base[name]
        for name, _ in suite.model.named_parameters()
    }  # fmt: skip
    experts = measured(suite, merged, ("pointwise", "depthwise", "norm"))
    plain = measured(suite, merged, ())
    zero = {task: torch.zeros_like(own) for task, own in experts.items()}
    record: dict[str, object] = {"row": asked.row, "scale": scale}
    record["share"] = [round(value, 2) for value in difference(plain, zero, experts)]
    for kinds in OWN:
        right = measured(suite, merged, kinds.split("+"))
        record[kinds] = [round(value, 2) for value in difference(right, plain, experts)]
        print(kinds, record[kinds], flush=True)
    asked.output.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
