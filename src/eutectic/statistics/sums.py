"""What one pass over the data adds up, and its form in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from eutectic.errors import NumericalError, RequestError
from eutectic.statistics.gram import GramSum
from eutectic.statistics.record import InputSums, below
from eutectic.statistics.settings import Settings
from eutectic.statistics.sites import Site
from eutectic.statistics.store import GRAM_NAMES

_BYTES = 8  # of one number in a running sum


@dataclass
class Plan:
    """What a run observes.

    Attributes:
        leaders: for each site, the site whose inputs it shares.
        gradient_sites: sites whose output gradients are summed.
        diagonal: parameters whose squared gradients are summed, by name.
        block: parameters whose gradients' outer products are summed, by name.
        aliases: names that stand for another name's weight.
        skipped: name -> why something asked for is not collected.
    """

    leaders: dict[Site, Site]
    gradient_sites: list[Site] = field(default_factory=list)
    diagonal: dict[str, nn.Parameter] = field(default_factory=dict)
    block: dict[str, nn.Parameter] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters whose own gradients are needed."""
        return [*self.diagonal.values(), *self.block.values()]

    def parts(
        self, settings: Settings, memory_bytes: int | None, layers_per_pass: int | None
    ) -> list[Plan]:
        """Split into plans whose running sums fit the memory, one pass over the data each.

        Raises:
            RequestError: one layer alone needs more than `memory_bytes`.
        """
        units = self._units(settings)
        groups: list[list[tuple[Plan, int]]] = [[]]
        for unit, need in units:
            if memory_bytes is not None and need > memory_bytes:
                raise RequestError(
                    f"the sums of '{unit.first_name}' and what goes with it take {need:,} bytes, "
                    f"more than the {memory_bytes:,} allowed.\n"
                    "Allow more memory, or leave the layer out with layers=…."
                )
            full = groups[-1] and (
                (memory_bytes is not None and sum(n for _, n in groups[-1]) + need > memory_bytes)
                or (layers_per_pass is not None and len(groups[-1]) >= layers_per_pass)
            )
            if full:
                groups.append([])
            groups[-1].append((unit, need))
        return [_join([unit for unit, _ in group]) for group in groups if group]

    @property
    def first_name(self) -> str:
        """The name of the first thing observed."""
        names = [*(s.name for s in self.leaders), *self.diagonal, *self.block]
        return names[0] if names else ""

    def _units(self, settings: Settings) -> list[tuple[Plan, int]]:
        """Return the smallest plans that cannot be split, each with the bytes of its sums."""
        units: list[tuple[Plan, int]] = []
        groups: dict[Site, list[Site]] = {}
        for site, leader in self.leaders.items():
            groups.setdefault(leader, []).append(site)
        wanted = set(self.gradient_sites)
        for leader, members in groups.items():
            outputs = [s for s in members if s in wanted]
            # The Gram and the pooled Gram.
            need = 2 * _BYTES * leader.shape[1] ** 2 if settings.grams else 0
            need += sum(_BYTES * s.shape[0] ** 2 for s in outputs)
            if need:
                units.append((Plan(dict.fromkeys(members, leader), outputs), need))
        for name, parameter in self.diagonal.items():
            units.append((Plan({}, diagonal={name: parameter}), _BYTES * parameter.numel()))
        for name, parameter in self.block.items():
            units.append((Plan({}, block={name: parameter}), _BYTES * parameter.numel() ** 2))
        return units


def _join(units: Sequence[Plan]) -> Plan:
    whole = Plan({})
    for unit in units:
        whole.leaders |= unit.leaders
        whole.gradient_sites += unit.gradient_sites
        whole.diagonal |= unit.diagonal
        whole.block |= unit.block
    return whole


class PassSums:
    """The running sums of one pass."""

    def __init__(self, plan: Plan, settings: Settings, device: torch.device) -> None:
        leaders = dict.fromkeys(plan.leaders.values()) if settings.grams else {}
        self.inputs = {site: InputSums(site.shape[1]) for site in leaders}
        self.gradients = {site: GramSum(site.shape[0]) for site in plan.gradient_sites}
        self.diagonal = {
            name: torch.zeros(p.shape, dtype=torch.float64, device=_sum_device(device))
            for name, p in plan.diagonal.items()
        }
        self.block = {name: GramSum(p.numel()) for name, p in plan.block.items()}

    def add_parameter_gradient(self, name: str, gradient: Tensor, batch: int) -> None:
        """Add one example's gradient of one parameter: squared, and as an outer product."""
        if not bool(torch.isfinite(gradient).all()):
            raise NumericalError(f"NaN or Inf in the gradient of '{name}', batch {batch}.")
        if name in self.diagonal:
            self.diagonal[name] += gradient.float().square().to(self.diagonal[name].device)
        if name in self.block:
            self.block[name].add(gradient.float().reshape(1, -1).clone())

    def state(self) -> dict[str, Tensor]:
        """Return everything needed to go on, in full precision."""
        state: dict[str, Tensor] = {}
        for site, sums in self.inputs.items():
            state |= {f"inputs/{site.name}/{k}": v for k, v in sums.state().items()}
        for site, gram in self.gradients.items():
            state |= {f"gradients/{site.name}/{k}": v for k, v in gram.state().items()}
        for name, gram in self.block.items():
            state |= {f"block/{name}/{k}": v for k, v in gram.state().items()}
        return state | {f"diagonal/{name}": v for name, v in self.diagonal.items()}

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Go on from a `state`."""
        for site, sums in self.inputs.items():
            sums.load(below(state, f"inputs/{site.name}/"), device)
        for site, gram in self.gradients.items():
            gram.load(below(state, f"gradients/{site.name}/"), device)
        for name, gram in self.block.items():
            gram.load(below(state, f"block/{name}/"), device)
        for name in self.diagonal:
            self.diagonal[name] = state[f"diagonal/{name}"].to(_sum_device(device))

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return (tokens, samples) for every layer that was summed over."""
        found = {site.name: (gram.count, 0) for site, gram in self.gradients.items()}
        for site, sums in self.inputs.items():
            found[site.name] = (sums.gram.count, sums.pooled.count)
        return found

    def tensors(self, settings: Settings) -> dict[str, Tensor]:
        """Return the sums as they are stored, `<parameter>/<statistic>` -> tensor.

        Raises:
            NumericalError: a sum is too large for the stored dtype.
        """
        rank = settings.rank
        found: dict[str, Tensor] = {}
        for site, sums in self.inputs.items():
            if sums.gram.count == 0:
                continue
            found |= _named(site.name, "gram", sums.gram.tensors(rank, site.name))
            found[f"{site.name}/input_sum"] = sums.total
            if sums.pooled.count:
                found |= _named(site.name, "pooled_gram", sums.pooled.tensors(rank, site.name))
                found[f"{site.name}/pooled_sum"] = sums.pooled_total
        for site, gram in self.gradients.items():
            found |= _named(site.name, "output_gradient_gram", gram.tensors(rank, site.name))
        for name, gram in self.block.items():
            found |= _named(name, "block_fisher", gram.tensors())
        found |= {f"{name}/fisher_diagonal": v for name, v in self.diagonal.items()}
        return {name: stored_form(name, value, settings.dtype) for name, value in found.items()}


def stored_form(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a sum in the dtype of the file.

    Raises:
        NumericalError: it does not fit.
    """
    value = value.to("cpu", dtype).contiguous()
    if not bool(torch.isfinite(value).all()):
        raise NumericalError(f"'{name}' is too large for {dtype}; collect with dtype=float64.")
    return value


def _named(layer: str, statistic: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    gram = GRAM_NAMES[statistic]
    names = {"gram": gram.dense, "factor": gram.factor, "diagonal": gram.diagonal}
    return {f"{layer}/{names[kind]}": value for kind, value in stored.items()}


def _sum_device(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device
