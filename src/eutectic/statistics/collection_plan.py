"""What a run observes: found out before it starts, split into passes that fit the memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eutectic.checkpoint.reader import sample_of
from eutectic.conventions import IA3_SUFFIX
from eutectic.errors import RequestError
from eutectic.models.batches import (
    Batch,
    Layout,
    call,
    examples,
    layout,
    same_memory,
    sample_count,
    transform,
)
from eutectic.models.hooks import evaluating, observing
from eutectic.models.sites import (
    Site,
    as_matrix,
    feeds_batch_first,
    find_sites,
    is_encoder_decoder,
    named_parameters,
)
from eutectic.statistics.group_gram import group_bytes
from eutectic.statistics.settings import Settings
from eutectic.statistics.sketch import sum_bytes

_BYTES = 8  # of one number in a running sum


@dataclass
class Plan:
    """What a run observes.

    `leaders` has for each site the one whose inputs it shares. Summed are the output gradients of
    `gradient_sites`, squared gradients of `diagonal`, and outer products of gradients of `block`.
    `aliases` stand for another name's weight; `skipped` says why something asked for is missing.
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

    def parts(self, settings: Settings) -> list[Plan]:
        """Split into plans whose running sums fit the memory, one pass over the data each."""
        memory_bytes, layers_per_pass = settings.memory_bytes, settings.layers_per_pass
        units = self._units(settings)
        if not units:
            none = "the model has no linear layer"
            if settings.layers is not None:
                none = f"no layer matches {list(settings.layers)}"
            reasons = "".join(f"\n  - {name}: {why}" for name, why in self.skipped.items())
            raise RequestError(
                f"nothing to collect: {none} that could be observed as asked.{reasons}\n"
                "Layers are chosen by globs over parameter names: '*.attention.*.weight'."
            )
        parts: list[Plan] = []
        used = layers = 0
        for unit, need in units:
            if memory_bytes is not None and need > memory_bytes:
                first = [*(s.name for s in unit.leaders), *unit.diagonal, *unit.block][0]
                raise RequestError(
                    f"the sums of '{first}' and what goes with it take {need:,} bytes, "
                    f"more than the {memory_bytes:,} allowed.\n"
                    "Allow more memory, or leave the layer out with layers=…."
                )
            full = memory_bytes is not None and used + need > memory_bytes
            if not parts or full or (layers_per_pass is not None and layers >= layers_per_pass):
                parts.append(Plan({}))
                used = layers = 0
            used, layers = used + need, layers + 1
            parts[-1].leaders |= unit.leaders
            parts[-1].gradient_sites += unit.gradient_sites
            parts[-1].diagonal |= unit.diagonal
            parts[-1].block |= unit.block
        return parts

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
            width = leader.shape[1]
            if settings.core is not None:
                width = len(settings.core.rows[leader.name])
            need = 2 * sum_bytes(width, settings.rank) if settings.grams else 0
            if leader.groups > 1:
                need = group_bytes(leader.groups, width // leader.groups) if settings.grams else 0
            need += sum(sum_bytes(s.shape[0], settings.rank) for s in outputs)
            if need:
                units.append((Plan(dict.fromkeys(members, leader), outputs), need))
        for name, parameter in self.diagonal.items():
            units.append((Plan({}, diagonal={name: parameter}), _BYTES * parameter.numel()))
        for name, parameter in self.block.items():
            units.append((Plan({}, block={name: parameter}), _BYTES * parameter.numel() ** 2))
        return units


def make_plan(model: nn.Module, batch: Batch, settings: Settings) -> Plan:
    """Return what is to be observed, after a forward pass of at most two examples.

    The pass shows which layers are called, and which of them see the same inputs.
    """
    plan = Plan({})
    parameters = named_parameters(model, settings.layers)
    if settings.fisher:
        plan.diagonal = parameters
    for name, p in parameters.items() if settings.block_fisher else ():
        if p.numel() > settings.block_limit and p.numel() == max(p.shape):
            plan.skipped[name] = f"block_fisher: {p.numel()} > {settings.block_limit} entries"
        elif p.numel() == max(p.shape, default=0):
            plan.block[name] = p
    if not (settings.grams or settings.output_gradients):
        return plan
    sites = find_sites(model, settings.layers, settings.convolutions, every_kind=True)
    device = device_of(model)
    sample = transform(examples(batch, 0, min(2, sample_count(batch))), lambda t: t.to(device))
    probe = Probe(make_layout(model, sample, settings))
    with evaluating(model), observing(model, sites.found, probe), torch.no_grad():
        call(model, sample)
    if settings.core is None:
        plan.leaders = probe.leaders(sites.found, settings.share_inputs)
    else:  # layers that see the same inputs have adapters of their own
        found = probe.leaders(sites.found, share=False)
        plan.leaders = {s: s for s in found if s.name in settings.core.rows}
    plan.aliases = sites.aliases
    plan.skipped |= sites.skipped | {s.name: "its inputs fit no mask" for s in probe.skipped}
    limit = settings.output_gradient_limit
    for site in plan.leaders if settings.output_gradients else ():
        if site.shape[0] <= limit:
            plan.gradient_sites.append(site)
        else:
            why = f"output_gradient_gram: {site.shape[0]} > {limit} outputs"
            plan.skipped[site.name] = why
    return plan


def describe_layers(
    plan: Plan, counts: Mapping[str, tuple[int, ...]], examples_seen: int
) -> dict[str, dict[str, Any]]:
    """Return the table of layers: kind, shapes, counts, and whose tensors are whose."""
    layers: dict[str, dict[str, Any]] = {}
    for site, leader in plan.leaders.items():
        tokens, samples = counts.get(leader.name, counts.get(site.name, (0, 0)))
        layers[site.name] = {
            "kind": site.kind,
            "shape": list(site.shape),
            "parameter": list(site.weight.shape),
            "count": tokens,
            # Not pooled, but differentiated.
            "sample_count": samples or (examples_seen if tokens else 0),
            "inputs": leader.name,
            "same_as": site.name,
        }
    for name, parameter in {**plan.diagonal, **plan.block}.items():
        shape = list(parameter.shape)
        entry = {"kind": "parameter", "shape": shape, "parameter": shape, "count": 0}
        entry |= {"sample_count": examples_seen, "inputs": name, "same_as": name}
        layers.setdefault(name, entry)
    for alias, name in plan.aliases.items():
        if name in layers:
            layers[alias] = dict(layers[name])
    return dict(sorted(layers.items()))


def sample_weights(model: nn.Module, plan: Plan) -> dict[str, dict[str, Any]]:
    """Return parameter name -> dtype and a few values, by which its weights are recognised.

    A fingerprint would depend on tied copies, heads, prefixes and the dtype of a file. Layers under
    a LoRA adapter count with their effective weight W₀ + ΔW, other adapters' are left out.
    """
    wrappers = {  # layer -> the adapter around it
        layer: module
        for module in model.modules()
        if isinstance(layer := getattr(module, "base_layer", None), nn.Module)
    }
    parameters: dict[str, tuple[Tensor, nn.Module | None]] = {}
    for site in plan.leaders:
        name = site.name.partition("[")[0]
        parameters.setdefault(name, (site.weight, wrappers.get(site.module)))
    for name, parameter in {**plan.diagonal, **plan.block}.items():
        parameters.setdefault(name, (parameter, None))
    adapted = {id(m.weight): w for m, w in wrappers.items() if isinstance(m.weight, Tensor)}
    samples: dict[str, dict[str, Any]] = {}
    for name, (weight, wrapper) in parameters.items():
        effective = _effective(weight.detach(), wrapper or adapted.get(id(weight)))
        if effective is not None:
            samples[name] = {
                "dtype": str(effective.dtype).removeprefix("torch."),
                "values": sample_of(effective).double().tolist(),
            }
    return dict(sorted(samples.items()))


def _effective(weight: Tensor, wrapper: Any) -> Tensor | None:
    """Return what a layer computes with: its weight, with the change that LoRA makes to it."""
    if wrapper is None or getattr(wrapper, "merged", False):
        return weight
    if any(f"{IA3_SUFFIX}." in f".{name}" for name, _ in wrapper.named_parameters()):
        return weight  # activations are scaled
    if not callable(getattr(wrapper, "get_delta_weight", None)):
        return None
    try:
        deltas = [wrapper.get_delta_weight(name) for name in wrapper.active_adapters]
    except (AttributeError, KeyError, NotImplementedError, RuntimeError):
        return None
    total = weight.float()
    for delta in deltas:
        total = total + delta.detach().float()
    return total


def make_layout(model: nn.Module, batch: Batch, settings: Settings) -> Layout:
    """Return the layout of a batch for this model."""
    paired, batch_first = is_encoder_decoder(model), feeds_batch_first(model)
    return layout(batch, paired, settings.token_mask, batch_first, settings.unmatched)


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's inputs belong: the device of its first parameter."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


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
        # What of the same inputs makes the rows: a kernel's patches, pixels, or the last axis.
        patches = site.path if site.kind == "convolution" else ""
        rows = "pixels" if site.kind == "transposed_convolution" else patches
        self._calls.setdefault(site, []).append((index, id(tokens.mask), rows))

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
