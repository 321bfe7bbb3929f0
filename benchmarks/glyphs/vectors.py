"""What averaging biases, norms and convolutions costs on glyphs, and what treating them gains.

    python benchmarks/glyphs/vectors.py --work DIR --output FILE.json

Two questions. *Own*: how good is the merge where one kind of tensor is each task's expert's own,
and the rest is merged: no treatment of that kind can gain more. *Parts*: convolutions as matrices
over patches (by the library), biases that restore the mean outputs or are the last column of an
augmented matrix, norms by least squares on what they normalise (by the formulas below).

α is chosen on validation images for each row; all rows read the same test images, so that errors
beside differences are paired.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from suite import load_suite
from table.merging import set_weights
from table.run import part_of
from table.suite import Suite, correct, mean, outcomes, percentages

import eutectic
from eutectic.methods import merge_matrices
from eutectic.types import LayerStatistics

PROXIES, VALIDATION = 128, 100
SCALES = (0.5, 0.7, 1.0, 1.4, 1.9)
METHODS: dict[str, dict[str, Any]] = {
    "iso_a": {},
    "regmean": {"off_diagonal": 0.9},
    "esm": {"preset": "vit"},
}
PARTS = ("convolutions", "biases", "augmented", "norms")
ROWS: dict[str, tuple[tuple[str, ...], ...]] = {
    "iso_a": (
        *((), ("convolutions",), ("biases",), ("augmented",), ("norms",)),
        *(("biases", "norms"), ("convolutions", "norms"), ("convolutions", "biases")),
        ("convolutions", "biases", "norms"),
    ),
    "regmean": ((), ("convolutions",), ("convolutions", "biases", "norms")),
    "esm": ((), ("convolutions",), ("convolutions", "biases", "norms")),
}
OWN = (
    *("matrix", "convolution", "depthwise", "bias", "norm"),
    *("convolution+depthwise", "bias+norm", "convolution+depthwise+bias+norm"),
)
Weights = Mapping[str, Tensor]


class Family:
    """Base, experts and statistics, in memory."""

    def __init__(self, suite: Suite, work: Path) -> None:
        self.suite = suite
        self.base = load_file(suite.base / "model.safetensors")
        self.experts = {t: load_file(f / "model.safetensors") for t, f in suite.experts.items()}
        self.modules = dict(suite.model.named_modules())
        self.statistics: dict[str, Any] = {}
        self.normalised: dict[str, dict[str, tuple[Tensor, Tensor, int]]] = {}
        for task, weights in self.experts.items():
            set_weights(suite.model, weights)
            batches = suite.proxies(task, 0, PROXIES)
            inputs = [dict(batch) for batch in batches.inputs]
            self.statistics[task] = eutectic.collect(suite.model, inputs, convolutions=True)
            self.normalised[task] = normalised(suite.model, inputs)

    def kind(self, name: str) -> str:
        """Return what a parameter is."""
        module = self.modules[name.rpartition(".")[0]]
        if isinstance(module, nn.LayerNorm):
            return "norm"
        if name.endswith("bias"):
            return "bias"
        if isinstance(module, nn.Conv2d):
            return "depthwise" if module.groups > 1 else "convolution"
        return "matrix"

    def deltas(self, name: str) -> Tensor:
        """Return `[T, …]`, what every expert changes."""
        base = self.base[name].double()
        return torch.stack([expert[name].double() - base for expert in self.experts.values()])

    def sums(self, name: str) -> list[LayerStatistics]:
        """Return the statistics of a weight, expert by expert."""
        return [self.statistics[task][name] for task in self.experts]


@torch.no_grad()
def normalised(model: nn.Module, inputs: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Return for every norm Σz², Σz and n of its inputs z before scale and shift, by channel."""
    found: dict[str, tuple[Tensor, Tensor, int]] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.LayerNorm, args: Any, _: Any) -> None:
            z = F.layer_norm(args[0].double(), module.normalized_shape, eps=module.eps)
            z = z.reshape(-1, z.shape[-1])
            squares, sums, count = found.get(name, (0, 0, 0))
            found[name] = (squares + z.square().sum(0), sums + z.sum(0), count + len(z))

        return add

    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
    handles = [module.register_forward_hook(hook(name)) for name, module in norms]
    for batch in inputs:
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def merged(family: Family, method: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the merged deltas at α = 1, biases that restore mean outputs left to `at`."""
    found = eutectic.merge_state_dicts(
        family.base,
        family.experts,
        method=method,
        statistics=family.statistics,
        scale=1.0,
        convolutions="matrix" if "convolutions" in parts else "average",
        **METHODS[method],
    )
    deltas = {name: found[name].double() - family.base[name].double() for name in found}
    names = list(deltas)
    if "augmented" in parts:
        for name in names:
            bias = name.removesuffix("weight") + "bias"
            if family.kind(name) == "matrix" and bias in deltas:
                deltas[name], deltas[bias] = augmented(family, method, name, bias)
    if "norms" in parts:
        for name in names:
            if family.kind(name) == "norm" and name.endswith("weight"):
                bias = name.removesuffix("weight") + "bias"
                deltas[name], deltas[bias] = least_squares(family, name, bias)
    return deltas


def augmented(family: Family, method: str, name: str, bias: str) -> tuple[Tensor, Tensor]:
    """Merge [W b] as one matrix, whose last input is one."""
    both = torch.cat([family.deltas(name), family.deltas(bias)[..., None]], 2)
    entries: list[LayerStatistics] = []
    for own in family.sums(name):
        gram, total = own.dense_gram(), own.input_sum
        assert gram is not None
        assert total is not None
        total = total.double()[:, None]
        corner = torch.full((1, 1), float(own.count), dtype=torch.float64)
        whole = torch.cat([torch.cat([gram, total], 1), torch.cat([total.T, corner], 1)])
        entries.append(LayerStatistics(gram=whole, count=own.count))
    result = merge_matrices(method, both, statistics=entries, **METHODS[method])
    return result[:, :-1], result[:, -1]


def least_squares(family: Family, name: str, bias: str) -> tuple[Tensor, Tensor]:
    """Return the γ and β whose outputs are nearest to every expert's on its own inputs."""
    scales, shifts = family.deltas(name), family.deltas(bias)
    site = name.rpartition(".")[0]
    known = [family.normalised[task][site] for task in family.experts]
    square = torch.stack([squares / count for squares, _, count in known])
    first = torch.stack([sums / count for _, sums, count in known])
    left = torch.stack(
        [square.mean(0), first.mean(0), first.mean(0), torch.ones_like(first[0])], 1
    ).view(-1, 2, 2)
    right = torch.stack([square * scales + first * shifts, first * scales + shifts], 2).mean(0)
    solution = torch.linalg.solve(left, right)
    return solution[:, 0], solution[:, 1]


def at(
    family: Family, deltas: Mapping[str, Tensor], scale: float, restore: bool
) -> dict[str, Tensor]:
    """Return the merged weights; with `restore`, b = mean of b_t + W_t x̄_t − W x̄_t."""
    weights = {n: (family.base[n].double() + scale * d).float() for n, d in deltas.items()}
    if not restore:
        return weights
    for name in deltas:
        if family.kind(name) != "bias":
            continue
        weight = name.removesuffix("bias") + "weight"
        module = family.modules[name.rpartition(".")[0]]
        groups = getattr(module, "groups", 1)
        total = torch.zeros_like(family.base[name], dtype=torch.float64)
        for task, own in zip(family.experts, family.sums(weight), strict=True):
            expert = family.experts[task]
            assert own.input_sum is not None
            inputs = (own.input_sum.double() / own.count).view(groups, -1)
            apart = (expert[weight] - weights[weight]).double()
            apart = apart.reshape(groups, -1, inputs.shape[1])
            total += expert[name].double() + (apart @ inputs[..., None]).flatten()
        weights[name] = (total / len(family.experts)).float()
    return weights


def measured(suite: Suite, weights: Weights, split: str) -> dict[str, Tensor]:
    """Return task -> which of its images are right."""
    set_weights(suite.model, weights)
    return outcomes(suite, suite.model, split)


def share(right: Mapping[str, Tensor], experts: Mapping[str, Tensor]) -> float:
    """Return the mean accuracy as a share of the experts', in percent."""
    return sum(
        100 * float(right[t].double().mean() / experts[t].double().mean()) for t in right
    ) / len(right)


def error(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], experts: Mapping[str, Tensor]
) -> float:
    """Return the standard error of the difference of two shares, image by image."""
    variances = [
        (100 * (one[t].double() - other[t].double()) / experts[t].double().mean()).var() / len(own)
        for t, own in experts.items()
    ]
    return float(sum(variances)) ** 0.5 / len(experts)


def own_kinds(family: Family, weights: Weights, experts: dict[str, Tensor]) -> dict[str, Any]:
    """Return the shares where tensors of some kinds are each expert's own."""
    found: dict[str, Any] = {}
    plain = measured(family.suite, weights, "test")
    for kinds in OWN:
        right: dict[str, Tensor] = {}
        for task, expert in family.experts.items():
            mixed = {
                n: expert[n] if family.kind(n) in kinds.split("+") else w
                for n, w in weights.items()
            }
            set_weights(family.suite.model, mixed)
            right[task] = correct(family.suite, family.suite.model, task, "test")
        found[kinds] = {
            "share": round(share(right, experts), 2),
            "difference": round(share(right, experts) - share(plain, experts), 2),
            "error": round(error(right, plain, experts), 2),
        }
        print("own", kinds, found[kinds], flush=True)
    return found


def row(
    family: Family, method: str, parts: tuple[str, ...], experts: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Return the record of one row, its outcomes and its weights."""
    start = time.process_time()
    deltas = merged(family, method, parts)
    restore = "biases" in parts
    seconds = time.process_time() - start
    curve = {
        scale: mean(
            percentages(measured(family.suite, at(family, deltas, scale, restore), "validation"))
        )
        for scale in SCALES
    }
    best = max(SCALES, key=lambda scale: curve[scale])
    weights = at(family, deltas, best, restore)
    right = measured(family.suite, weights, "test")
    record = {
        "share": round(share(right, experts), 2),
        "accuracy": round(mean(percentages(right)), 2),
        "scale": best,
        "validation": {str(scale): round(value, 2) for scale, value in curve.items()},
        "merge_cpu_seconds": round(seconds, 1),
    }
    return record, right, weights


def main() -> None:
    """Measure every row, and write what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--images", type=int, default=500, help="test images a task")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    suite = load_suite(asked.work, "hard", asked.tasks)
    used = {"validation": VALIDATION, "test": asked.images}
    splits = {
        task: {split: part_of(own[split], 0, count) for split, count in used.items()}
        for task, own in suite.splits.items()
    }
    suite = replace(suite, splits=splits)
    family = Family(suite, asked.work)
    experts: dict[str, Tensor] = {}
    for task, weights in family.experts.items():
        set_weights(suite.model, weights)
        experts[task] = correct(suite, suite.model, task, "test")
    base = share(measured(suite, family.base, "test"), experts)
    found: dict[str, Any] = {
        "tasks": list(suite.tasks),
        "images": asked.images,
        "base": round(base, 2),
        "experts": round(mean(percentages(experts)), 2),
        "rows": {},
    }
    for method in asked.methods:
        plain: dict[str, Tensor] = {}
        for parts in ROWS[method]:
            record, right, weights = row(family, method, parts, experts)
            if not parts:
                plain = right
                if method == "iso_a":
                    found["own"] = own_kinds(family, weights, experts)
            else:
                record["difference"] = round(share(right, experts) - share(plain, experts), 2)
                record["error"] = round(error(right, plain, experts), 2)
            name = " + ".join((method, *parts))
            found["rows"][name] = record
            print(name, {k: v for k, v in record.items() if k != "validation"}, flush=True)
            asked.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
