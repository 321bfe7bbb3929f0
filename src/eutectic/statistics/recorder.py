"""From observed inputs and outputs to sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from eutectic.errors import StatisticsError
from eutectic.models.masks import Layout, Tokens, same_memory, token_means
from eutectic.models.sites import Site, as_matrix, output_rows
from eutectic.statistics.gram import GramSum, as_float, check_finite


class InputSums:
    """What is summed over one layer's inputs: per token, and per sample after pooling."""

    def __init__(self, width: int) -> None:
        self.gram = GramSum(width)
        self.pooled = GramSum(width)
        self.total = torch.zeros(width, dtype=torch.float64)
        self.pooled_total = torch.zeros(width, dtype=torch.float64)

    def add(self, rows: Tensor, pooled: Tensor | None) -> None:
        """Add tokens `[n, in]` and per-sample means `[samples, in]`."""
        self.total += rows.sum(0, dtype=torch.float64).cpu()
        self.gram.add(rows)
        if pooled is not None:
            self.pooled_total += pooled.sum(0, dtype=torch.float64).cpu()
            self.pooled.add(pooled)

    def state(self) -> dict[str, Tensor]:
        """Return everything needed to go on."""
        state = {"total": self.total, "pooled_total": self.pooled_total}
        state |= {f"gram.{k}": v for k, v in self.gram.state().items()}
        return state | {f"pooled.{k}": v for k, v in self.pooled.state().items()}

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Go on from a `state`."""
        self.total, self.pooled_total = state["total"], state["pooled_total"]
        self.gram.load(below(state, "gram."), device)
        self.pooled.load(below(state, "pooled."), device)


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries under a prefix, without it."""
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


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

    Args:
        leaders: for each site, the site whose inputs it shares (itself when it shares none). Only
            a leader's inputs are summed; that the others see the same is checked on every call.
        inputs: sums per leader; empty when no Grams are wanted.
        gradients: sites whose output gradients are wanted.
    """

    def __init__(
        self,
        leaders: dict[Site, Site],
        inputs: dict[Site, InputSums],
        gradients: dict[Site, GramSum],
    ) -> None:
        self.leaders = leaders
        self.inputs = inputs
        self.gradients = gradients
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
        """Close a forward pass.

        Raises:
            StatisticsError: a layer that shares another's inputs was not called with them.
        """
        self._layout = None
        for leader, held in self._held.items():
            for item in held:
                raise self._unshared(next(iter(item.waiting)), leader)

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
        if self.inputs:
            self._observe_inputs(site, inputs, matrix, tokens)
        if site in self.gradients and outputs.requires_grad:
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
        self.inputs[site].add(rows, sample_means(tokens, matrix))

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
            self.gradients[site].add(rows)
        self.outputs = []


def token_rows(tokens: Tokens, activations: Tensor) -> Tensor:
    """Return the counted tokens `[n, features]`, in memory of their own."""
    arranged = tokens.arrange(activations.detach())
    if tokens.mask is not None:
        return as_float(arranged[tokens.mask])
    rows = arranged.reshape(-1, arranged.shape[-1])
    return rows.clone() if rows.dtype in (torch.float32, torch.float64) else as_float(rows)


def sample_means(tokens: Tokens, activations: Tensor) -> Tensor | None:
    """Return the mean over counted tokens of every sample that has any, `[samples, features]`."""
    if not tokens.pooled:
        return None
    arranged = as_float(tokens.arrange(activations.detach()))
    if tokens.mask is None:
        return token_means(arranged, None) if arranged.shape[1] else None
    means = token_means(arranged, tokens.mask)
    return means[tokens.mask.any(1).to(means.device)]


class Probe:
    """Watches one small forward pass to learn which layers are called and which share inputs."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._inputs: list[tuple[Tensor, int]] = []
        self._calls: dict[Site, list[tuple[int, int, str]]] = {}
        self.skipped: set[Site] = set()

    def encoder_output(self, states: Tensor) -> None:
        """Note what cross-attention will read."""
        self._layout.encoder_outputs.append(states)

    def observe(self, site: Site, inputs: Tensor, outputs: Tensor) -> None:
        """Note which input, under which mask, a layer was called with."""
        tokens = self._layout.tokens(site, as_matrix(site, inputs))
        if tokens is None:
            self.skipped.add(site)
            return
        index = self._index_of(inputs)
        patches = site.path if site.kind == "convolution" else ""
        self._calls.setdefault(site, []).append((index, id(tokens.mask), patches))

    def _index_of(self, inputs: Tensor) -> int:
        for index, (earlier, version) in enumerate(self._inputs):
            if same_memory(earlier, inputs) and version == inputs._version:
                return index
        # Kept alive, so that no later tensor can lie at the same address.
        self._inputs.append((inputs, inputs._version))
        return len(self._inputs) - 1

    def leaders(self, sites: list[Site], share: bool) -> dict[Site, Site]:
        """Return for each site the one called first with the same inputs in the same order.

        Of the ways to call an attention module, those that were not seen are left out. Any other
        layer that was not reached (an expert of a mixture) may be reached later, and stays.
        """
        first: dict[tuple[tuple[int, int, str], ...], Site] = {}
        found: dict[Site, Site] = {}
        for site, calls in self._calls.items():
            found[site] = first.setdefault(tuple(calls), site) if share else site
        for site in sites:
            if site not in self.skipped and "in_proj_weight" not in site.name:
                found.setdefault(site, site)
        return {site: found[site] for site in sites if site in found}
