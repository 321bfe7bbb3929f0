"""Which layers of a model can be routed, which are by default, and what that costs."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from eutectic.conventions import PARTS, is_attention_or_mlp_input, layer_group
from eutectic.errors import RequestError
from eutectic.models.sites import Site, routable_sites, selected
from eutectic.options import listed
from eutectic.routed.routed_modules import RoutedAttention, RoutedLinear


@dataclass(frozen=True)
class RoutedCosts:
    """What routing adds to a model, and the same of the model without experts."""

    layers: int
    parameters: int  # of the experts and routers
    nbytes: int  # of the same; routers are float32
    multiply_adds_per_token: int  # for the expert's two thin products
    multiply_adds_per_sample: int  # for the routers
    model_parameters: int
    model_multiply_adds_per_token: int  # of its linear layers


def choose_layers(model: nn.Module, patterns: Sequence[str] | None = None) -> list[Site]:
    """Return the layers to route, by globs over parameter names.

    None takes the attention projections and the first matrix of every MLP, by their usual names.
    """
    if any(isinstance(m, RoutedLinear | RoutedAttention) for m in model.modules()):
        raise RequestError("the model is routed already; build from the merged model itself.")
    layers, patterns = routable_sites(model), listed(patterns)
    if patterns is None:
        chosen = [layer for layer in layers if is_attention_or_mlp_input(layer.name)]
    else:
        chosen = [layer for layer in layers if selected(layer.name, patterns)]
    if not chosen:
        shown = ", ".join(layer.name for layer in layers[:5]) or "none: it has no linear layer"
        raise RequestError(
            f"no layer to route: {'none has a usual name' if patterns is None else patterns}.\n"
            f"Name layers by globs over parameter names. Layers: {shown} …"
        )
    paths = {layer.path for layer in chosen}
    for layer in chosen:
        if layer.kind == "out_projection" and layer.path.rpartition(".")[0] not in paths:
            raise RequestError(
                f"'{layer.name}' can be routed only together with its in-projection, which torch "
                "applies in one piece with it.\nAdd the in-projection, or leave this layer out."
            )
    return chosen


def routed_layers(
    model: nn.Module,
    patterns: Sequence[str] | None = None,
    statistics: Mapping[str, Iterable[str]] | None = None,
) -> tuple[list[Site], list[str]]:
    """Return the layers to route, and the names of default layers that are left out.

    Packed attention keeps three inputs for one in-projection where queries and keys differ, and
    routing decides on one: it is left out with its output projection. Statistics tell where that
    is so; without any, only the cross-attention of torch's own decoder layers is known. Of a model
    of pictures and texts, as CLIP, a tower is left out of which no expert's statistics saw
    anything. Of layers that are named by `patterns`, none is left out.
    """
    chosen = choose_layers(model, patterns)
    if patterns is not None:
        return chosen, []

    def is_crossed(layer: Site) -> bool:
        if statistics:
            return all(in_parts(layer.name, keys) for keys in statistics.values())
        parent, _, child = layer.path.rpartition(".")
        decoder = isinstance(model.get_submodule(parent), nn.TransformerDecoderLayer)
        return decoder and child == "multihead_attn"

    packed = [layer for layer in chosen if layer.kind == "in_projection"]
    crossed = [layer.path for layer in packed if is_crossed(layer)]
    crossed += [f"{path}.out_proj" for path in crossed]
    unseen = _unseen_tower(chosen, statistics or {})
    left_out = [s.name for s in chosen if s.path in crossed or s.role == unseen]
    return [s for s in chosen if s.path not in crossed and s.role != unseen], left_out


def layer_kinds(names: Iterable[str]) -> dict[str, int]:
    """Return kind of layer -> how many there are: names with `*` for numbers, in their order."""
    return dict(Counter(map(layer_group, names)))


def unrouted_layers(model: nn.Module, chosen: Iterable[Site] = ()) -> list[str]:
    """Return the layers of a model that could be routed, and are not nor will be (`chosen`).

    In them, as in everything that is no layer, a routed model stays the merged one at any rank.
    """
    paths = {layer.path for layer in chosen}
    return [site.name for site in routable_sites(model) if site.path not in paths]


def _unseen_tower(layers: Sequence[Site], statistics: Mapping[str, Iterable[str]]) -> str | None:
    """Return the role of the tower that no statistics saw, of a model that has two."""
    if not {"image", "text"} <= {layer.role for layer in layers} or not statistics:
        return None

    def is_seen(role: str) -> bool:
        names = [layer.name for layer in layers if layer.role == role]
        seen = (_seen(given) for given in statistics.values())
        return any(n == key or n.endswith(f".{key}") or key.endswith(f".{n}")
                   for keys in seen for key in keys for n in names)  # fmt: skip

    unseen = [role for role in ("image", "text") if not is_seen(role)]
    return unseen[0] if len(unseen) == 1 else None


def _seen(statistics: Iterable[str]) -> list[str]:
    """Return the layers that saw a token; all where there are names alone."""
    if not isinstance(statistics, Mapping):
        return list(statistics)
    return [name for name, entry in statistics.items() if getattr(entry, "count", 1)]


def in_parts(name: str, keys: Iterable[str]) -> bool:
    """Tell whether statistics hold `name[q]` and not `name`, under any prefix."""

    def held(wanted: str) -> bool:
        pairs = ((f".{key}", f".{wanted}") for key in keys)
        return any(one.endswith(other) or other.endswith(one) for one, other in pairs)

    return held(name + PARTS[0]) and not held(name)


def routed_costs(
    model: nn.Module,
    experts: int,
    rank: int = 32,
    layers: Sequence[str] | None = None,
    statistics: Mapping[str, Iterable[str]] | None = None,
) -> RoutedCosts:
    """Return what routing would add with T experts of rank ρ, from the model's shapes alone.

    The model may be on any device, meta too; `layers` and `statistics` are as in `build_routed`.
    Statistics, if at hand, tell which default layers building will leave out, see `routed_layers`.
    """
    chosen, _ = routed_layers(model, layers, statistics)
    thin = {layer: min(rank, *layer.shape) * sum(layer.shape) for layer in chosen}
    scored = sum(layer.shape[1] for layer in chosen)
    routers = experts * (scored + len(chosen))
    nbytes = sum(n * layer.weight.element_size() for layer, n in thin.items())
    return RoutedCosts(
        layers=len(chosen),
        parameters=experts * sum(thin.values()) + routers,
        nbytes=experts * nbytes + 4 * routers,
        multiply_adds_per_token=sum(thin.values()),
        multiply_adds_per_sample=experts * scored,
        model_parameters=sum(p.numel() for p in model.parameters()),
        model_multiply_adds_per_token=sum(math.prod(s.shape) for s in routable_sites(model)),
    )
