"""How well the routers of a routed model tell the experts' data apart, per layer and task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.conventions import block_of
from eutectic.errors import Note, RequestError
from eutectic.models.arguments import signature_of
from eutectic.models.hooks import evaluating
from eutectic.routed.expert_weights import expert_statistics
from eutectic.routed.routed_folder import experts_of
from eutectic.routed.routed_modules import Experts
from eutectic.routed.router import POOLED, has_pooled, pooled_form
from eutectic.routed.routing_modes import elect, routing, routing_of
from eutectic.tables import InNotebooks, Shown, data_frame, facts, table
from eutectic.types import LayerStatistics, as_statistics

MOST_SAMPLES = 1000  # of a task; shares are known to a few hundredths by then
DRAWS = 4096  # of an estimate
# A task is near chance where less than this share of what lies above chance is reached.
NEAR_CHANCE = 0.25


@dataclass(frozen=True)
class RouterQuality(InNotebooks):
    """Shares of each task's samples that are sent to the task's own expert.

    Attributes:
        measured: by decisions on data; else estimated from statistics.
        chance: 1 / number of experts.
        samples: task -> how many were routed, or stood behind its statistics.
        layers: layer -> task -> share.
        decisions: task -> share by the decision for the whole network, which `predict` takes; of an
            estimate, which knows each layer alone, the mean over the layers.
        confusion: task -> expert -> share of the task's samples by that decision; empty of an
            estimate.
    """

    measured: bool
    chance: float
    samples: Mapping[str, int]
    layers: Mapping[str, Mapping[str, float]]
    decisions: Mapping[str, float]
    confusion: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RouterQuality:
        """Return what `record` was made of."""
        return cls(**{f.name: record[f.name] for f in fields(cls) if f.name in record})

    @property
    def bound(self) -> float:
        """Shares up to it are near chance."""
        return self.chance + NEAR_CHANCE * (1 - self.chance)

    def blocks(self) -> dict[str, dict[str, float]]:
        """Return block of the network -> task -> mean share of its layers, in their order."""
        held: dict[str, list[Mapping[str, float]]] = {}
        for layer, shares in self.layers.items():
            held.setdefault(block_of(layer), []).append(shares)
        return {
            block: {task: sum(row[task] for row in rows) / len(rows) for task in self.samples}
            for block, rows in held.items()
        }

    def note(self) -> Note | None:
        """Return a warning of tasks whose decisions are near chance, if there are any."""
        if self.chance == 1:
            return None
        weak = {t: share for t, share in self.decisions.items() if share <= self.bound}
        if not weak:
            return None
        numbers = {"shares": weak, "chance": self.chance, "measured": self.measured}
        return Note("router_near_chance", tuple(weak), numbers, level="warning")

    def to_pandas(self) -> Any:
        """Return the shares as a data frame: layers as rows, tasks as columns."""
        return data_frame(({"layer": n, **own} for n, own in self.layers.items()), "layer")

    def __repr__(self) -> str:
        """Show the shares of blocks and tasks."""
        return "\n".join(self._parts())

    def _parts(self) -> Sequence[Shown]:
        """Return the same for notebooks too."""
        tasks = list(self.samples)
        rows = [[b, *(f"{own[t]:.1%}" for t in tasks)] for b, own in self.blocks().items()]
        rows.append(["decision", *(f"{self.decisions[t]:.1%}" for t in tasks)])
        how = "measured" if self.measured else "estimated from statistics"
        title = f"RouterQuality: {how}, by chance {self.chance:.0%}"
        return facts(title, {}), table(["", *tasks], rows)

    def record(self) -> dict[str, Any]:
        """Return it as JSON-serialisable values."""
        return {
            "measured": self.measured,
            "chance": self.chance,
            "samples": dict(self.samples),
            "decisions": dict(self.decisions),
            "layers": {layer: dict(shares) for layer, shares in self.layers.items()},
            "confusion": {task: dict(shares) for task, shares in self.confusion.items()},
        }


@torch.no_grad()
def router_quality(
    routed: nn.Module, batches: Mapping[str, Iterable[Any]], *, most: int = MOST_SAMPLES
) -> RouterQuality:
    """Return how often samples of each task are sent to the task's own expert.

    Each task's first `most` samples are run through the routed model as it routes by default. On
    the data that a router was made of, shares flatter it; on other data they are what to expect.

    Args:
        routed: a routed model.
        batches: expert -> batches of its task: mappings of model inputs, samples first.
        most: samples of a task.

    Raises:
        RequestError: data of what is no expert, or without a sample.
    """
    handle = routing_of(routed)
    first = next(p for p in routed.parameters() if p.is_floating_point())
    takes = signature_of(routed).taken
    layers: dict[str, dict[str, float]] = {}
    decisions: dict[str, float] = {}
    samples: dict[str, int] = {}
    confusion: dict[str, dict[str, float]] = {}
    for name, own in batches.items():
        right = handle.index(name)
        with routing(routed, record=True) as votes, evaluating(routed):
            for batch in own:
                routed(**{key: _placed(batch[key], first) for key in takes(batch)})
                if len(next(iter(votes.values()), ())) >= most:
                    break
        if not votes:
            raise RequestError(f"the data of '{name}' hold no sample that a routed layer saw.")
        for layer, chosen in votes.items():
            layers.setdefault(layer, {})[name] = _share(chosen == right)
        elected = elect(list(votes.values()), handle)
        samples[name], decisions[name] = len(elected), _share(elected == right)
        confusion[name] = {e: _share(elected == t) for t, e in enumerate(handle.experts)}
    return RouterQuality(True, 1 / len(handle.experts), samples, layers, decisions, confusion)


def estimated_quality(
    routed: nn.Module, statistics: Mapping[str, Mapping[str, LayerStatistics]]
) -> RouterQuality | None:
    """Return the same from a router's statistics alone; None where they hold no pooled sums.

    Pooled inputs of a task are taken as Gaussian with the mean and the covariance of its
    statistics, so that its scores W x + b are, too: `[T]`-dimensional, of which seeded draws are
    decided. Every layer is taken alone, also where the model adds evidence up over layers, which
    decides better. None too of subspaces (`sim`), whose scores are no linear ones.
    """
    handle, modules = routing_of(routed), experts_of(routed)
    if handle.router == "sim":
        return None
    names = [experts.name for experts in modules.values()]
    called = expert_statistics(statistics, handle.experts, names, "router statistics")
    layers: dict[str, dict[str, float]] = {}
    samples: dict[str, int] = {}
    for experts in modules.values():
        row: dict[str, float] = {}
        for t, (name, own) in enumerate(zip(handle.experts, called, strict=True)):
            held = as_statistics(statistics[name])
            entry = held.read(own[experts.name], POOLED, in_rows=True)
            if not has_pooled(entry) or entry.sample_count < 2:
                return None
            row[name] = _expected_share(experts, entry, t)
            samples[name] = entry.sample_count
        layers[experts.name] = row
    deciding = [row for n, row in layers.items() if handle.decider in (None, n)]
    means = {n: sum(row[n] for row in deciding) / len(deciding) for n in handle.experts}
    return RouterQuality(False, 1 / len(handle.experts), samples, layers, means)


def _expected_share(experts: Experts, entry: LayerStatistics, right: int) -> float:
    """Return the share of Gaussian inputs with an expert's moments that a router sends to it."""
    assert entry.pooled_sum is not None
    weight, bias = experts.router.weight.double().cpu(), experts.router.bias.double().cpu()
    total, count = entry.pooled_sum.double(), entry.sample_count
    summed, spread = weight @ total, pooled_form(entry, weight)
    covariance = (spread - torch.outer(summed, summed) / count) / (count - 1)
    mean = summed / count + bias
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()
    draws = torch.randn(DRAWS, len(mean), generator=torch.Generator().manual_seed(0)).double()
    # A router that scales its inputs to length 1 has no bias: the winner is the same.
    return _share((mean + draws @ root.T).argmax(-1) == right)


def _placed(value: Any, like: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
