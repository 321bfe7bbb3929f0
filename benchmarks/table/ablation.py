"""What of Iso-A matters, and ideas beyond it: share of the experts on *validation* data.

    python benchmarks/table/ablation.py text --work DIR --regime hard --tasks 8

Nothing here reads test data. Every variant is one function of a layer (its task matrices and the
moments of its inputs and output gradients) and is searched over α like the rows of the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from table.merging import PROXIES, MergedRow, collect_statistics, set_weights
from table.run import by_validation, cached, check_settings, load_suite
from table.suite import Suite, accuracies, normalised

from eutectic.linalg import lapack
from eutectic.linalg.polar import polar
from eutectic.statistics import load_statistics
from eutectic.tuning.output_error import closed_form_scale, output_terms
from eutectic.types import LayerStatistics

RIDGES = (0.01, 0.1, 0.3)
COUNTS = (8, 32, PROXIES)


@dataclass(frozen=True)
class Moment:
    """Eigenvalues and eigenvectors of a second moment `[n, n]`: a ridge only shifts the former."""

    values: Tensor
    vectors: Tensor

    def power(self, exponent: float, ridge: float) -> Tensor:
        """Return (C + ε·tr(C)/n·I) to a power."""
        shifted = self.values.clamp_min(0) + ridge * float(self.values.mean())
        return (self.vectors * shifted**exponent) @ self.vectors.mT


@dataclass(frozen=True)
class Layer:
    """One matrix: task matrices `[T, out, in]` and what the experts' proxies say of it."""

    deltas: Tensor
    statistics: Sequence[LayerStatistics]

    @cached_property
    def inputs(self) -> list[Moment]:
        """Of every expert's inputs, and last of their mean."""
        return moments([torch.as_tensor(s.dense_gram()) / s.count for s in self.statistics])

    @cached_property
    def gradients(self) -> list[Moment]:
        """Of every expert's output gradients, and last of their mean."""
        grams = [torch.as_tensor(s.output_gradient_gram) / s.count for s in self.statistics]
        return moments([gram.double() for gram in grams])


Variant = Callable[[Layer], Tensor]


def moments(matrices: list[Tensor]) -> list[Moment]:
    """Decompose each, and their mean."""
    return [Moment(*lapack.eigh(m)) for m in [*matrices, torch.stack(matrices).mean(0)]]


def iso_a(layer: Layer, ridge: float) -> Tensor:
    """The registered method, from decompositions that every ridge shares."""
    total = sum(
        delta.double() @ moment.power(0.5, ridge)
        for delta, moment in zip(layer.deltas, layer.inputs[:-1], strict=True)
    )
    return flat(torch.as_tensor(total)) @ layer.inputs[-1].power(-0.5, ridge)


def both_sides(layer: Layer, ridge: float) -> Tensor:
    """Iso-A with the metric of the output gradients on the left as well."""
    total = sum(
        left.power(0.5, ridge) @ delta.double() @ right.power(0.5, ridge)
        for left, delta, right in zip(
            layer.gradients[:-1], layer.deltas, layer.inputs[:-1], strict=True
        )
    )
    left, right = layer.gradients[-1], layer.inputs[-1]
    return left.power(-0.5, ridge) @ flat(torch.as_tensor(total)) @ right.power(-0.5, ridge)


def layerwise(layer: Layer, ridge: float) -> Tensor:
    """Iso-A, every layer at its own α in closed form; the α that is searched multiplies all."""
    merged = iso_a(layer, ridge)
    terms = output_terms(list(layer.deltas), merged.to(layer.deltas.dtype), layer.statistics)
    return closed_form_scale([terms]).scale * merged


def singular(layer: Layer, ridge: float | None, by_energy: bool) -> Tensor:
    """TSV-M, in the metric of the inputs where a ridge is given.

    Ranks are r/T for every expert, or, by energy, the r largest singular values of all together.
    """
    found = [
        lapack.svd(delta if ridge is None else delta @ moment.power(0.5, ridge).to(delta))
        for delta, moment in zip(layer.deltas, layer.inputs[:-1], strict=True)
    ]
    rank = min(layer.deltas.shape[1:])
    kept = [rank // len(found)] * len(found)
    if by_energy:
        least = torch.cat([S for _, S, _ in found]).sort(descending=True).values[rank - 1]
        kept = [int((S >= least).sum()) for _, S, _ in found]
    cut = [(U[:, :k], S[:k], V[:, :k]) for (U, S, V), k in zip(found, kept, strict=True)]
    U, V = (polar(torch.cat([part[side] for part in cut], 1)).factor for side in (0, 2))
    merged = (U * torch.cat([S for _, S, _ in cut])) @ V.mT
    return merged if ridge is None else merged @ layer.inputs[-1].power(-0.5, ridge).to(merged)


def flat(matrix: Tensor) -> Tensor:
    """Mean singular value times the polar factor."""
    result = polar(matrix)
    return result.factor * result.mean_singular_value


VARIANTS: dict[str, Variant] = {
    "both sides": partial(both_sides, ridge=0.1),
    "α of every layer in closed form": partial(layerwise, ridge=0.1),
    "TSV-M, ranks 1/T": partial(singular, ridge=None, by_energy=False),
    "TSV-M, ranks by energy": partial(singular, ridge=None, by_energy=True),
    "TSV-M in the input metric, ranks 1/T": partial(singular, ridge=0.1, by_energy=False),
    "TSV-M in the input metric, ranks by energy": partial(singular, ridge=0.1, by_energy=True),
}


def layers(suite: Suite, files: Mapping[str, Path], base: Mapping[str, Tensor]) -> Iterator[
    tuple[str, Layer]
]:  # fmt: skip
    """Yield every matrix that has statistics, one at a time: moments of wide layers are large."""
    statistics = [load_statistics(files[task]) for task in suite.tasks]
    opened = [safe_open(f / "model.safetensors", "pt") for f in suite.experts.values()]
    for name, parameter in suite.model.named_parameters():
        entries = [s[name] for s in statistics if name in s and s[name].count]
        if parameter.ndim != 2 or len(entries) != len(statistics):
            continue
        deltas = torch.stack([file.get_tensor(name) - base[name] for file in opened])
        yield name, Layer(deltas, entries)


def vectors(suite: Suite, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Means of the experts' biases and norms, as every method of the table takes them."""
    opened = [safe_open(f / "model.safetensors", "pt") for f in suite.experts.values()]
    return {
        name: torch.stack([file.get_tensor(name) for file in opened]).mean(0) - base[name]
        for name, parameter in suite.model.named_parameters()
        if parameter.ndim == 1
    }


def variants_of(count: int) -> dict[str, Variant]:
    """What is measured with so many proxies a task."""
    ridges: dict[str, Variant] = {
        f"Iso-A, ridge {ridge}, {count} proxies": partial(iso_a, ridge=ridge) for ridge in RIDGES
    }
    return ridges | VARIANTS if count == PROXIES else ridges


def main() -> None:
    """Measure what is missing and print the shares."""
    parser = argparse.ArgumentParser(description="Ablate Iso-A on validation data.")
    parser.add_argument("suite", choices=["text", "glyphs", "adapters"])
    parser.add_argument("--work", type=Path, required=True, help="folder of the suite's experts")
    parser.add_argument("--regime", default="hard")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS, help="proxies a task")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    suite = load_suite(arguments)
    results = arguments.work / "results" / suite.name / "ablation"
    check_settings(suite, results)
    base = load_file(suite.base / "model.safetensors")

    def of_experts() -> dict[str, float]:
        found: dict[str, float] = {}
        for task, folder in suite.experts.items():
            set_weights(suite.model, load_file(folder / "model.safetensors"))
            found[task] = accuracies(suite, suite.model, "validation")[task]
        return found

    experts = cached(results / "experts.json", of_experts)
    for count in sorted(arguments.counts, reverse=True):
        chosen = {n: v for n, v in variants_of(count).items() if arguments.only in n}
        missing = {
            name: variant
            for name, variant in chosen.items()
            if not (results / f"{name.replace('/', ' of ')}.json").is_file()
        }
        merged = {name: vectors(suite, base) for name in missing}
        if missing:
            files = collect_statistics(suite, arguments.work, 0, count, gradients=True)
            for matrix, layer in layers(suite, files, base):
                for name, variant in missing.items():
                    merged[name][matrix] = variant(layer).float()
        for name in chosen:
            deltas = merged.get(name, {})

            def search(deltas: dict[str, Tensor] = deltas) -> dict[str, object]:
                row = MergedRow(base, deltas, 0.0, 0, {})
                return by_validation(suite, row, 0.5).as_record()

            curve = cached(results / f"{name.replace('/', ' of ')}.json", search)
            best = next(p for p in curve["points"] if p["scale"] == curve["scale"])
            share = normalised(best["parts"], experts)
            print(f"| {name} | {share:.1f} | {curve['scale']:.2g} |", flush=True)


if __name__ == "__main__":
    main()
