"""From a merged model, its experts and their statistics to a routed model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from eutectic.checkpoint.reader import same_content, sample_of
from eutectic.errors import NumericalError, RequestError, StatisticsError, suggest
from eutectic.linalg.essential import essential_subspace
from eutectic.models.sites import Site, feeds_batch_first
from eutectic.options import options_from
from eutectic.routed.expert_weights import ExpertWeights, StateDict, expert_statistics, open_experts
from eutectic.routed.forward_pass import Routing
from eutectic.routed.heads import StoredHead
from eutectic.routed.routed_folder import finish
from eutectic.routed.routed_layers import routed_layers
from eutectic.routed.routed_modules import install
from eutectic.routed.router import (
    POOLED,
    Router,
    RouterKind,
    discriminant_router,
    prototype_router,
)
from eutectic.routed.single_decision import ROUTERS, SINGLE, mad_router, sim_router
from eutectic.types import LayerStatistics, Statistics, as_statistics

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class RoutedSettings:
    """Further options of `build_routed`, which describes them."""

    accumulate: bool | None = None
    base: str | Path | None = None
    shrinkage: float | None = None
    statistics_of: Literal["expert", "any"] = "expert"
    heads: Mapping[str, StoredHead] | None = None
    decider: str | None = None


class RoutedOptions(TypedDict, total=False):
    """The fields of `RoutedSettings` as keyword arguments."""

    accumulate: bool | None
    base: str | Path | None
    shrinkage: float | None
    statistics_of: Literal["expert", "any"]
    heads: Mapping[str, StoredHead] | None
    decider: str | None


def build_routed(
    model: Model,
    experts: Mapping[str, StateDict | str | Path],
    statistics: Mapping[str, Mapping[str, LayerStatistics]],
    router_statistics: Mapping[str, Mapping[str, LayerStatistics]] | None = None,
    *,
    rank: int = 32,
    router: RouterKind | None = None,
    layers: Sequence[str] | None = None,
    **options: Unpack[RoutedOptions],
) -> Model:
    """Return a copy of a merged model whose layers keep, per expert, what merging lost.

    For every routed layer and expert, δ_t = W_t − W_merged; E_t are the first ρ principal
    directions of X_t δ_tᵀ; B_t = E_t `[out, ρ]` and F_t = E_tᵀ δ_t `[ρ, in]`. The layer computes
    W_merged x + b + B_t(F_t x), where t is decided per sample from the mean of its unmasked inputs.
    No dense expert is ever formed.

    The copy keeps its class, its methods (`generate`, `config`, …) and the names of its parameters,
    beside which `<layer>.experts.*` appear; `routed.save_pretrained(folder)` writes it and
    `load_routed` reads it. Masks are taken from the arguments of the outermost call and of the
    transformers models inside: `attention_mask`, or torch's `src_key_padding_mask`.

    Args:
        model: the merged model, any module. It is not modified, and not moved to another device.
        experts: name -> state dict, checkpoint path (read tensor by tensor) or PEFT LoRA folder.
        statistics: name -> statistics of the expert on its proxy data, for the directions.
        router_statistics: name -> statistics of the *merged* model on the same data: what the
            router will see. Default: `statistics`.
        rank: ρ, the same for all layers (cut to a layer's size). Full rank reproduces the expert on
            every input that its proxy data span.
        router: "discriminant", or "prototype" as published. Default: discriminant where every
            layer has pooled statistics, else prototype. "mad" and "sim" decide once for the whole
            network, in a first pass with the experts off, from one layer's pooled inputs: by the
            Gaussian discriminant, or by how much of them each task's subspace leaves over.
        layers: globs over parameter names; default: attention projections and the first matrix of
            every MLP.
        **options: how experts are read and routed:

            - `accumulate`: layers decide by the sum of the log-posteriors of the layers passed so
              far. Default: yes for the discriminant, no for prototypes (as published).
            - `decider`: of "mad" and "sim", the layer that decides (default: the last routed
              one, of the encoder where there is a decoder too).
            - `base`: the checkpoint before merging; only adapters need it.
            - `shrinkage`: of the discriminant's covariance, in (0, 1]; default: estimated.
            - `statistics_of`: `expert`: statistics must have been collected on the expert itself,
              and the router's on this model; `any`: they may come from any checkpoint.
            - `heads`: expert -> its head, of `eutectic.routed.find_heads`. The routed copy keeps
              them: `routed.expert_heads[name]` is the routed model with that head, and
              `eutectic.routed.predict` takes the chosen expert's for every sample.

    Returns:
        The routed copy. `routed.routing.short` tells, layer by layer, the experts whose tokens or
        differences determine fewer than ρ directions, and how many they do;
        `routed.routing.left_out` the default layers that cannot be routed. T = 1 is allowed: the
        only expert is always chosen. An expert equal to the merged model adds nothing.

    Raises:
        RequestError: nothing to route, an expert without statistics or without a layer's tensor,
            an adapter without `base`, a rank below 1, or a model that is routed already.
        StatisticsError: statistics of another model or checkpoint or without what the router
            needs, a prototype of zero norm.
        NumericalError: NaN or Inf in an expert's weights.

    Reference: arXiv 2606.19164 (experts and the prototype router).
    """
    asked = options_from(RoutedSettings, options, "build_routed")
    shrinkage = asked.shrinkage
    if rank < 1 or (shrinkage is not None and not 0 < shrinkage <= 1):
        raise RequestError(
            f"rank must be at least 1 and shrinkage in (0, 1], got {rank} and {shrinkage}."
        )
    chosen, left_out = routed_layers(model, layers, statistics)
    names = tuple(experts)
    if unknown := [name for name in asked.heads or {} if name not in names]:
        raise RequestError(
            f"heads are given for {unknown}, which are no experts: {', '.join(names)}."
        )
    paths = [layer.name for layer in chosen]
    called = expert_statistics(statistics, names, paths, "statistics")
    routes, routes_called = statistics, called
    if router_statistics is not None:
        routes = router_statistics
        routes_called = expert_statistics(routes, names, paths, "router statistics")

    def of_router(layer: Site) -> list[LayerStatistics]:
        own = zip(names, routes_called, strict=True)
        reads = POOLED | {"input_sum"}
        held = ((as_statistics(routes[n]), c[layer.name]) for n, c in own)
        return [of_expert.read(key, reads, in_rows=True) for of_expert, key in held]

    if router is None:
        pooled = all(
            _pooled_in(as_statistics(routes[n]), c[layer.name])
            for layer in chosen
            for n, c in zip(names, routes_called, strict=True)
        )
        router = "discriminant" if pooled else "prototype"
    if shrinkage is not None and router not in ("discriminant", "mad"):
        raise RequestError(
            f"shrinkage belongs to the discriminant router and mad, got router='{router}'.\n"
            "Leave it out, or give statistics with pooled sums and router='discriminant'."
        )
    decider = deciding_layer(router, asked.accumulate, asked.decider, chosen)
    routed = copy.deepcopy(model)
    steps = router == "discriminant" if asked.accumulate is None else asked.accumulate
    routing = Routing(
        names, router, steps, feeds_batch_first(model), left_out=left_out, decider=decider
    )
    with open_experts(model, experts, asked.base) as opened, torch.no_grad():
        for layer in chosen:
            entries: list[LayerStatistics] = []
            for source, own, of_routes in zip(opened, called, routes_called, strict=True):
                n, key = source.name, own[layer.name]
                if asked.statistics_of == "expert":
                    where = f"'{layer.name}', expert '{n}'"
                    _check_origin(statistics[n], key, source.read(layer.name), where)
                if asked.statistics_of == "expert" and router_statistics is not None:
                    where = f"'{layer.name}', the router's data of '{n}'"
                    _check_origin(routes[n], of_routes[layer.name], layer.weight, where)
                entries.append(as_statistics(statistics[n]).read(key, {"gram"}, in_rows=True))
            up, down, kept = _thin_experts(layer, opened, entries, rank)
            if short := {n: k for n, k in zip(names, kept, strict=True) if k < up.shape[-1]}:
                routing.short[layer.name] = short
            scorer = _router(router, of_router(layer), layer, shrinkage, names)
            install(routed, layer, up, down, scorer.to(layer.weight.device), routing)
    return finish(routed, routing, asked.heads)


def deciding_layer(
    router: RouterKind | None, accumulate: bool | None, decider: str | None, chosen: Sequence[Site]
) -> str | None:
    """Return the layer that decides for the whole network; None where every layer does.

    Of an encoder and a decoder it is the encoder's: generation runs it before the decoder is known.
    A router of None is one that decides at every layer.

    Raises:
        RequestError: the router does not take these, or the decider is no routed layer.
    """
    if router not in SINGLE:
        if decider is not None:
            got = "no router" if router is None else f"router='{router}'"
            raise RequestError(f"decider belongs to the routers {' and '.join(SINGLE)}, got {got}.")
        return None
    if accumulate:
        raise RequestError(f"the router '{router}' decides once: there is nothing to accumulate.")
    encoder = [layer.name for layer in chosen if layer.role == "encoder"]
    layers = encoder or [layer.name for layer in chosen]
    if decider is not None and decider not in layers:
        known = decider in [layer.name for layer in chosen]
        why = "\nIt is of the decoder, and the encoder decides." if known else ""
        raise RequestError(
            f"no routed layer '{decider}' that could decide.{suggest(decider, list(layers))}{why}"
        )
    return decider or layers[-1]


def _pooled_in(statistics: Statistics, name: str) -> bool:
    """Tell, from a header alone, whether the discriminant router can be made of a layer."""
    there = all(statistics.has(name, sum_) for sum_ in POOLED)
    return there and statistics.read(name, ()).sample_count > 0


def _thin_experts(
    layer: Site, experts: Sequence[ExpertWeights], statistics: list[LayerStatistics], rank: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Return B `[T, out, ρ]`, F `[T, ρ, in]` in the layer's dtype, and directions per expert.

    Directions that neither the tokens nor δ_t determine are zero columns.
    """
    merged = layer.matrix(layer.weight.detach()).float().cpu()
    size = min(rank, *layer.shape)
    up = torch.zeros(len(experts), layer.shape[0], size)
    down = torch.zeros(len(experts), size, layer.shape[1])
    kept: list[int] = []
    for t, (expert, entry) in enumerate(zip(experts, statistics, strict=True)):
        where = f"'{layer.name}', expert '{expert.name}'"
        weight = layer.matrix(expert.read(layer.name))
        if weight.shape != merged.shape:
            raise RequestError(
                f"{where}: the weight has the shape {[*weight.shape]}, the model's "
                f"{[*merged.shape]}."
            )
        residual = weight - merged
        if not bool(torch.isfinite(residual).all()):
            raise NumericalError(f"{where}: NaN or Inf in the weights; nothing was built.")
        directions = essential_subspace(residual, entry, size, where=where).directions
        k = directions.shape[1]
        up[t, :, :k] = directions.float()
        down[t, :k] = (directions.T @ residual.double()).float()
        kept.append(k)
    return up.to(layer.weight), down.to(layer.weight), kept


def _router(
    kind: RouterKind,
    entries: list[LayerStatistics],
    layer: Site,
    shrinkage: float | None,
    names: Sequence[str],
) -> Router:
    if kind == "prototype":
        router: Router = prototype_router(entries, f"'{layer.name}'", names)
    elif kind == "discriminant":
        router = discriminant_router(entries, f"'{layer.name}'", shrinkage, names)
    elif kind == "mad":
        router = mad_router(entries, f"'{layer.name}'", shrinkage, names)
    elif kind == "sim":
        router = sim_router(entries, f"'{layer.name}'", names)
    else:
        raise RequestError(f"unknown router '{kind}'; known: {', '.join(ROUTERS)}.")
    if router.weight.shape[1] != layer.shape[1]:
        raise StatisticsError(
            f"'{layer.name}': the router statistics are for {router.weight.shape[1]} inputs, the "
            f"layer has {layer.shape[1]}.\nThey belong to another model; collect them again."
        )
    return router


def _check_origin(
    statistics: Mapping[str, LayerStatistics], called: str, weight: Tensor, where: str
) -> None:
    """Refuse statistics that were collected with another `weight`; the layer is `called` so there.

    Files keep a few values of every weight; statistics that keep none are taken as they are.
    """
    sample = as_statistics(statistics).samples.get(called)
    if sample is not None and not same_content(sample, sample_of(weight)):
        raise StatisticsError(
            f"{where}: the statistics were collected on another checkpoint.\n"
            "Collect them on this one, or accept them with statistics_of='any'."
        )
