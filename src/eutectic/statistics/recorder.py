"""What hooks show of a model, added up: the running sums of one pass over the data."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.cluster.devices import has_float64
from eutectic.errors import NumericalError, StatisticsError
from eutectic.models.batches import Layout, Tokens, same_memory, token_means
from eutectic.models.sites import Site, as_matrix, output_rows
from eutectic.statistics.collection_plan import Plan
from eutectic.statistics.gram import GramSum, Rank, as_float, check_finite
from eutectic.statistics.group_gram import GroupedGramSum
from eutectic.statistics.settings import Settings
from eutectic.statistics.sketch import SketchSum, sum_of
from eutectic.types import gram_names

# Of a layer's inputs, per token and per sample: the Gram and the sum beside it.
_OF_INPUTS = {"gram": "input_sum", "pooled_gram": "pooled_sum"}
_PARTS = ("count", "rows", "matrix", "diagonal")  # of the state of a sum, as far as it has them
CORE = "core_gram"  # of what adapters' rows see of the inputs, in place of these


class PassSums:
    """The running sums of one pass, by `<parameter>/<statistic>`.

    `grams` are of outer products; `totals` of vectors or squared gradients, in float64.
    """

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self.grams: dict[str, GramSum | SketchSum | GroupedGramSum] = {}
        self.totals: dict[str, Tensor] = {}
        self._devices: dict[str, torch.device] = {}
        self._core = {} if settings.core is None else settings.core.rows
        for site in dict.fromkeys(plan.leaders.values()) if settings.grams else ():
            if self._core:
                self._begin(f"{site.name}/{CORE}", len(self._core[site.name]), site.weight)
                continue
            if site.groups > 1:
                self._begin_groups(site)
                continue
            for gram, total in _OF_INPUTS.items():
                self._begin(f"{site.name}/{gram}", site.shape[1], site.weight, settings.rank)
                zeros = torch.zeros(site.shape[1], dtype=torch.float64)
                self.totals[f"{site.name}/{total}"] = zeros
        for site in plan.gradient_sites:
            key = f"{site.name}/output_gradient_gram"
            self._begin(key, site.shape[0], site.weight, settings.rank)
        for name, parameter in plan.block.items():
            self._begin(f"{name}/block_fisher", parameter.numel(), parameter)
        for name, parameter in plan.diagonal.items():
            device = _sum_device(parameter)
            zeros = torch.zeros(parameter.shape, dtype=torch.float64, device=device)
            self.totals[f"{name}/fisher_diagonal"] = zeros

    def _begin(self, key: str, width: int, parameter: Tensor, rank: Rank | None = None) -> None:
        self.grams[key], self._devices[key] = sum_of(width, rank), _sum_device(parameter)

    def _begin_groups(self, site: Site) -> None:
        """Begin what is kept of a grouped convolution: no router ever reads its pooled sums."""
        key, width = f"{site.name}/gram", site.shape[1]
        self.grams[key] = GroupedGramSum(site.groups, width // site.groups)
        self._devices[key] = _sum_device(site.weight)
        self.totals[f"{site.name}/input_sum"] = torch.zeros(width, dtype=torch.float64)

    def add_inputs(self, site: Site, rows: Tensor, means: Tensor | None) -> None:
        """Add tokens `[n, in]` and per-sample means `[samples, in]`."""
        if self._core:
            seen = rows @ self._core[site.name].to(rows).mT
            self.grams[f"{site.name}/{CORE}"].add(seen)
            return
        for added, (gram, total) in zip((rows, means), _OF_INPUTS.items(), strict=True):
            if added is not None and f"{site.name}/{gram}" in self.grams:
                self.totals[f"{site.name}/{total}"] += added.sum(0, dtype=torch.float64).cpu()
                self.grams[f"{site.name}/{gram}"].add(added)

    def add_parameter_gradient(self, name: str, gradient: Tensor, batch: int) -> None:
        """Add one example's gradient of one parameter: squared, and as an outer product."""
        if not bool(torch.isfinite(gradient).all()):
            raise NumericalError(f"NaN or Inf in the gradient of '{name}', batch {batch}.")
        total = self.totals.get(f"{name}/fisher_diagonal")
        if total is not None:
            total += gradient.float().square().to(total.device)
        if (block := self.grams.get(f"{name}/block_fisher")) is not None:
            block.add(as_float(gradient).float().reshape(1, -1).clone())

    def state(self) -> dict[str, Tensor]:
        """Return everything needed to go on, in full precision."""
        grams = {f"{k}/{part}": v for k, g in self.grams.items() for part, v in g.state().items()}
        return grams | self.totals

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""
        for key, gram in self.grams.items():
            own = {part: state[f"{key}/{part}"] for part in _PARTS if f"{key}/{part}" in state}
            gram.load(own, self._devices[key])
        for key, total in self.totals.items():
            self.totals[key] = state[key].to(total.device)

    def join(self, state: Mapping[str, Tensor]) -> None:
        """Add the sums of other batches, by their `state`."""
        for key, gram in self.grams.items():
            parts = (p for p in _PARTS if f"{key}/{p}" in state)
            gram.join({p: state[f"{key}/{p}"] for p in parts})
        for key, total in self.totals.items():
            total += state[key].to(total.device)

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return (tokens, samples) for every layer that was summed over."""
        found: dict[str, tuple[int, int]] = {}
        for key, gram in self.grams.items():
            name, _, statistic = key.rpartition("/")
            if statistic == "gram":
                pooled = self.grams.get(f"{name}/pooled_gram")
                found[name] = (gram.count, 0 if pooled is None else pooled.count)
            elif statistic == CORE:
                found[name] = (gram.count, 0)
            elif statistic == "output_gradient_gram":
                found.setdefault(name, (gram.count, 0))
        return found

    def tensors(self, settings: Settings) -> dict[str, Tensor]:
        """Return the sums as they are stored, `<parameter>/<statistic>` -> tensor."""
        found: dict[str, Tensor] = {}
        for key, gram in self.grams.items():
            name, _, statistic = key.rpartition("/")
            rank = None if statistic == "block_fisher" else settings.rank
            stored = gram.tensors(rank, name)
            names = zip(("gram", "factor", "diagonal"), gram_names(statistic), strict=True)
            found |= {f"{name}/{n}": stored[form] for form, n in names if form in stored}
            if gram.count and statistic in _OF_INPUTS:
                total = f"{name}/{_OF_INPUTS[statistic]}"
                found[total] = self.totals[total]
        found |= {k: v for k, v in self.totals.items() if k.endswith("/fisher_diagonal")}
        return {name: stored_form(name, value, settings.dtype) for name, value in found.items()}


def stored_form(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a sum in the dtype of the file."""
    value = value.to("cpu", dtype).contiguous()
    if not bool(torch.isfinite(value).all()):
        raise NumericalError(
            f"'{name}' is too large for {dtype}; collect in float64 (--dtype float64)."
        )
    return value


def _sum_device(parameter: Tensor) -> torch.device:
    # Apple's GPUs cannot add in float64.
    device = parameter.device
    return device if has_float64(device.type) else torch.device("cpu")


@dataclass
class Output:
    """One call of a layer, waiting for the gradient of its output."""

    site: Site
    tokens: Tokens
    like: Tensor
    edge: torch.autograd.graph.GradientEdge


@dataclass(eq=False)
class Held:
    """A leader's input, alive until every layer that shares it was called.

    Were it not kept, its address could be given to another tensor, which would pass for it.
    """

    inputs: Tensor
    version: int
    waiting: set[Site]


class Recorder:
    """Adds up what the hooks show, one batch at a time.

    `leaders` has for each site the site whose inputs it shares (itself when it shares none). Only a
    leader's inputs are summed; that the others see the same is checked on every call.
    """

    def __init__(self, leaders: dict[Site, Site], sums: PassSums) -> None:
        self.leaders = leaders
        self.sums = sums
        self.outputs: list[Output] = []
        self._layout: Layout | None = None
        self._batch = 0
        self._followers: dict[Site, set[Site]] = {}
        for site, leader in leaders.items():
            if site is not leader:
                self._followers.setdefault(leader, set()).add(site)
        self._held: dict[Site, list[Held]] = {}

    def begin(self, layout: Layout, batch: int) -> None:
        """Prepare for a forward pass."""
        self._layout, self._batch = layout, batch
        self.outputs = []
        self._held = {}

    def end(self) -> None:
        """Close a forward pass."""
        self._layout = None
        for leader, held in self._held.items():
            if held:
                raise self._unshared(next(iter(held[0].waiting)), leader)

    def encoder_output(self, states: Tensor) -> None:
        """Note what cross-attention will read."""
        if self._layout is not None:
            self._layout.encoder_outputs.append(states)

    def observe(self, site: Site, inputs: Tensor, outputs: Tensor) -> None:
        """Add one call of one layer."""
        if self._layout is None or site not in self.leaders:
            return
        matrix = as_matrix(site, inputs)
        tokens = self._layout.tokens(site, matrix)
        if tokens is None:
            return
        leader = self.leaders[site].name
        if any(f"{leader}/{kind}" in self.sums.grams for kind in ("gram", CORE)):
            self._observe_inputs(site, inputs, matrix, tokens)
        if f"{site.name}/output_gradient_gram" in self.sums.grams and outputs.requires_grad:
            edge = torch.autograd.graph.get_gradient_edge(outputs)
            self.outputs.append(Output(site, tokens, outputs.detach(), edge))

    def _observe_inputs(self, site: Site, inputs: Tensor, matrix: Tensor, tokens: Tokens) -> None:
        leader = self.leaders[site]
        if leader is not site:
            self._check_shared(site, leader, inputs)
            return
        if followers := self._followers.get(site):
            held = Held(inputs, inputs._version, set(followers))
            self._held.setdefault(site, []).append(held)
        rows = token_rows(tokens, matrix)
        check_finite(rows, site.name, self._batch, "inputs")
        self.sums.add_inputs(site, rows, sample_means(tokens, matrix))

    def _check_shared(self, site: Site, leader: Site, inputs: Tensor) -> None:
        queue = self._held.get(leader, [])
        held = next((h for h in queue if site in h.waiting), None)
        if held is None or held.version != inputs._version or not same_memory(held.inputs, inputs):
            raise self._unshared(site, leader)
        held.waiting.remove(site)
        if not held.waiting:
            queue.remove(held)

    def _unshared(self, site: Site, leader: Site) -> StatisticsError:
        return StatisticsError(
            f"'{site.name}' shared its inputs with '{leader.name}' at first, but not in batch "
            f"{self._batch}.\nThe model chooses its path by the data: pass share_inputs=False "
            "(--no-share-inputs)."
        )

    def add_gradients(self, gradients: list[Tensor | None]) -> None:
        """Add the gradients of `outputs`, in their order; None stands for zero."""
        for output, gradient in zip(self.outputs, gradients, strict=True):
            site = output.site
            if gradient is None:
                gradient = torch.zeros_like(output.like)
            rows = token_rows(output.tokens, output_rows(site, gradient))
            check_finite(rows, site.name, self._batch, "output gradients")
            self.sums.grams[f"{site.name}/output_gradient_gram"].add(rows)
        self.outputs = []


def token_rows(tokens: Tokens, activations: Tensor) -> Tensor:
    """Return the counted tokens `[n, features]`, in memory of their own."""
    arranged = tokens.arrange(activations.detach())
    if tokens.mask is not None:
        return as_float(arranged[tokens.mask])
    rows = arranged.reshape(-1, arranged.shape[-1])
    found = as_float(rows)
    return rows.clone() if found.dtype == rows.dtype and found.device == rows.device else found


def sample_means(tokens: Tokens, activations: Tensor) -> Tensor | None:
    """Return the mean over counted tokens of every sample that has any, `[samples, features]`."""
    if not tokens.pooled:
        return None
    arranged = as_float(tokens.arrange(activations.detach()))
    if tokens.mask is None:
        return token_means(arranged, None) if arranged.shape[1] else None
    means = token_means(arranged, tokens.mask)
    return means[tokens.mask.any(1).to(means.device)]
