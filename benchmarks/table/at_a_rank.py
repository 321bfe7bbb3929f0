"""What becomes of `iso_regmean` with its spectrum and its rank, on validation texts alone.

    python benchmarks/table/at_a_rank.py text --work DIR --regime lora --directions 32 all \
        --spectrum 0 0.3 1 --scales 1.4 2

Each merge at each α: the share of the experts' accuracy and the mean cross-entropy, which tells
settings apart that no accuracy of so few texts does. Test texts are not read.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from table import merging
from table.merging import Row, collect_statistics, merge_row, set_weights
from table.run import VALIDATION_TEXTS, load_suite
from table.suite import Suite, correct, logits, mean, normalised, percentages, set_parameters


def of_experts(suite: Suite) -> dict[str, float]:
    """Return each expert's accuracy on its own task's validation texts, in percent."""
    from safetensors.torch import load_file

    right = {}
    for task, folder in suite.experts.items():
        set_weights(suite.model, load_file(folder / "model.safetensors"))
        right[task] = correct(suite, suite.model, task, "validation")
    return percentages(right)


def measured(suite: Suite) -> tuple[dict[str, float], float]:
    """Return the model's accuracy task by task, in percent, and its mean cross-entropy."""
    right, losses = {}, {}
    for task in suite.tasks:
        batches = suite.splits[task]["validation"]
        scores = logits(suite, suite.model, task, batches)
        right[task] = scores.argmax(1) == batches.labels
        losses[task] = nn.functional.cross_entropy(scores, batches.labels).item()
    return percentages(right), mean(losses)


def main() -> None:
    """Print a line for every setting."""
    parser = argparse.ArgumentParser(description="Try spectra and ranks on validation texts.")
    parser.add_argument("suite", choices=["text"])
    parser.add_argument("--work", type=Path, required=True, help="folder of the suite's experts")
    parser.add_argument("--regime", default="lora", help="lora, lora-unequal or lora-extracted")
    parser.add_argument("--tasks", type=int, default=8, help="the first so many")
    parser.add_argument("--directions", nargs="+", default=["32"], help="numbers, or all")
    parser.add_argument("--spectrum", nargs="+", type=float, default=[0.3], metavar="P")
    parser.add_argument("--scales", nargs="+", type=float, default=[2.0], metavar="α")
    parser.add_argument("--validation-texts", type=int, default=VALIDATION_TEXTS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    merging.apart = False
    suite = load_suite(arguments)
    files = collect_statistics(suite, arguments.work, 0, core=True)
    experts = of_experts(suite)
    print("| directions | p | α | % of experts | cross-entropy |\n|---|---|---|---|---|")
    for asked, power in product(arguments.directions, arguments.spectrum):
        kept = None if asked == "all" else int(asked)
        parameters = {"spectrum": power} | ({} if kept is None else {"directions": kept})
        adapter = None if kept is None else {"rank": kept}
        row = Row("iso_regmean", parameters, seeded=True, core=True, adapter=adapter)
        merged = merge_row(suite, row, arguments.work, 0, files)
        for scale in arguments.scales:
            set_parameters(suite.model, merged.base, merged.deltas, scale)
            found, loss = measured(suite)
            share = normalised(found, experts)
            print(f"| {asked} | {power:g} | {scale:g} | {share:.1f} | {loss:.3f} |", flush=True)


if __name__ == "__main__":
    main()
