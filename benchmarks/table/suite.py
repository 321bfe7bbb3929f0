"""A suite: one base, its experts, their frozen heads and their data, held in memory to be scored.

A suite's folder `benchmarks/<name>/suite.py` fills the record; nothing here knows texts or images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from precision import fast_products
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Batches:
    """Examples of like length in batches, and where each belongs in the original order.

    Attributes:
        inputs: keyword arguments of the model, batch by batch.
        order: `[n]`, the original index of each row of the batches laid end to end.
        labels: `[n]`, in the original order.
    """

    inputs: Sequence[Inputs]
    order: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Suite:
    """What a table is made from.

    Attributes:
        name: of the suite and the regime, as files are named.
        base: the base checkpoint's folder.
        experts: task -> folder of its expert.
        model: the base's body, whose parameters are overwritten again and again.
        pool: (outputs of the model, inputs) -> features `[batch, hidden]`.
        heads: task -> frozen linear head.
        splits: task -> split -> batches.
        layers: globs of the parameters that fine-tuning changes.
        proxies: (task, seed, count) -> batches of examples drawn from the training side.
        adapters: task -> what the merging command is given instead of `experts[task]`, where the
            expert is an adapter and `experts[task]` the same made dense, to be measured.
        general: figures of the model as it is that belong to no task, such as what it forgot.
        convolutions: whether statistics have them too.
    """

    name: str
    base: Path
    experts: Mapping[str, Path]
    model: nn.Module
    pool: Callable[[object, Inputs], Tensor]
    heads: Mapping[str, nn.Linear]
    splits: Mapping[str, Mapping[str, Batches]]
    layers: tuple[str, ...]
    proxies: Callable[[str, int, int], Batches]
    adapters: Mapping[str, Path] = field(default_factory=dict[str, Path])
    general: Callable[[], dict[str, float]] | None = None
    convolutions: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in order."""
        return tuple(self.experts)


@torch.inference_mode()
def logits(suite: Suite, model: nn.Module, task: str, batches: Batches) -> Tensor:
    """Return `[n, classes]` in the original order; products in bfloat16 where that is fast."""
    rows: list[Tensor] = []
    for inputs in batches.inputs:
        with fast_products():
            features = suite.pool(model(**inputs), inputs)
        rows.append(suite.heads[task](features.float()))
    stacked = torch.cat(rows)
    result = torch.empty_like(stacked)
    result[batches.order] = stacked
    return result


def correct(suite: Suite, model: nn.Module, task: str, split: str) -> Tensor:
    """Return `[n]`, whether the largest logit is the label's."""
    batches = suite.splits[task][split]
    return logits(suite, model, task, batches).argmax(1) == batches.labels


def outcomes(suite: Suite, model: nn.Module, split: str) -> dict[str, Tensor]:
    """Return task -> `correct`."""
    return {task: correct(suite, model, task, split) for task in suite.tasks}


def accuracies(suite: Suite, model: nn.Module, split: str) -> dict[str, float]:
    """Return task -> accuracy in percent."""
    return percentages(outcomes(suite, model, split))


def percentages(right: Mapping[str, Tensor]) -> dict[str, float]:
    """Return task -> share of the examples that are right, in percent."""
    return {task: 100 * own.double().mean().item() for task, own in right.items()}


def mean(values: Mapping[str, float]) -> float:
    """Mean over tasks."""
    return sum(values.values()) / len(values)


def normalised(values: Mapping[str, float], experts: Mapping[str, float]) -> float:
    """Mean over tasks of accuracy as a share of the expert's, in percent."""
    return sum(100 * values[task] / experts[task] for task in values) / len(values)


@torch.no_grad()
def set_parameters(model: nn.Module, base: Inputs, deltas: Inputs, scale: float) -> None:
    """Put W₀ + α Δ into the model, for every parameter that has a delta."""
    for name, parameter in model.named_parameters():
        value = base[name]
        parameter.copy_(value + scale * deltas[name] if name in deltas else value)
