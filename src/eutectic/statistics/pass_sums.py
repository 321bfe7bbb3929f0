"""What one pass over the data adds up, and its form in a file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from eutectic.errors import NumericalError
from eutectic.statistics.collection_plan import Plan
from eutectic.statistics.gram import GramSum
from eutectic.statistics.recorder import InputSums, below
from eutectic.statistics.settings import Settings
from eutectic.statistics.statistics_file import GRAM_NAMES


class PassSums:
    """The running sums of one pass."""

    def __init__(self, plan: Plan, settings: Settings) -> None:
        leaders = dict.fromkeys(plan.leaders.values()) if settings.grams else {}
        self.inputs = {site: InputSums(site.shape[1]) for site in leaders}
        self.gradients = {site: GramSum(site.shape[0]) for site in plan.gradient_sites}
        self.diagonal = {
            name: torch.zeros(p.shape, dtype=torch.float64, device=_sum_device(p))
            for name, p in plan.diagonal.items()
        }
        self.block = {name: GramSum(p.numel()) for name, p in plan.block.items()}
        self._plan = plan

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

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""
        for site, sums in self.inputs.items():
            sums.load(below(state, f"inputs/{site.name}/"), _sum_device(site.weight))
        for site, gram in self.gradients.items():
            gram.load(below(state, f"gradients/{site.name}/"), _sum_device(site.weight))
        for name, gram in self.block.items():
            gram.load(below(state, f"block/{name}/"), _sum_device(self._plan.block[name]))
        for name, total in self.diagonal.items():
            self.diagonal[name] = state[f"diagonal/{name}"].to(total.device)

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
        raise NumericalError(
            f"'{name}' is too large for {dtype}; collect in float64 (--dtype float64)."
        )
    return value


def _named(layer: str, statistic: str, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    gram = GRAM_NAMES[statistic]
    names = {"gram": gram.dense, "factor": gram.factor, "diagonal": gram.diagonal}
    return {f"{layer}/{names[kind]}": value for kind, value in stored.items()}


def _sum_device(parameter: Tensor) -> torch.device:
    # Apple's GPUs cannot add in float64.
    return torch.device("cpu") if parameter.device.type == "mps" else parameter.device
