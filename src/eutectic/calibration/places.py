"""The layers that are calibrated, in the order in which a forward pass comes to them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from eutectic.calibration.settings import Settings
from eutectic.conventions import classification_head, is_output_vocabulary
from eutectic.models.batches import Batch, Layout, call, layout
from eutectic.models.hooks import evaluating
from eutectic.models.sites import (
    Site,
    as_matrix,
    feeds_batch_first,
    find_scalings,
    find_sites,
    is_encoder_decoder,
    selected,
)

_KINDS = {"scaling": "norms", "convolution": "convolutions"}
_AFFINE_TOLERANCE = 1e-4  # relative; a norm in float32 is affine to a few rounding errors


@dataclass(frozen=True, eq=False)
class Place:
    """A layer that passes stop in front of, and which of its tensors change."""

    site: Site
    weight: str  # parameter in memory
    bias: str | None  # None where there is none
    changes_weight: bool
    changes_bias: bool

    @property
    def path(self) -> str:
        """The module's."""
        return self.site.path

    @property
    def scaling(self) -> bool:
        """Whether it scales channels, as norms do, and multiplies by no matrix."""
        return self.site.kind == "scaling"

    @property
    def kind(self) -> str:
        """Which of the settings' `sites` its weight is."""
        return _KINDS.get(self.site.kind, "matrices")

    @property
    def parameters(self) -> list[str]:
        """The parameters that change."""
        changing = ((self.weight, self.changes_weight), (self.bias, self.changes_bias))
        return [name for name, changes in changing if name is not None and changes]


@dataclass
class Survey:
    """What a small forward pass showed.

    `left` says of the parameters of linear maps and norms that keep the merged values, why;
    `blocks` are the paths of repeated modules that a pass enters once: the model is made of them.
    """

    places: list[Place]
    left: dict[str, str]
    blocks: list[str]


def make_layout(model: nn.Module, batch: Batch) -> Layout:
    """Return which tokens of a batch count."""
    return layout(batch, is_encoder_decoder(model), None, feeds_batch_first(model), "skip")


def survey(model: nn.Module, batch: Batch, settings: Settings, keep: Mapping[str, str]) -> Survey:
    """Return the places of a model after a pass over a batch, of which one or two examples do.

    `keep` says of parameters that keep their values whatever is asked for, why.
    """
    left: dict[str, str] = {}
    candidates = _candidates(model, settings, keep, left)
    calls: dict[str, list[_Call]] = {}
    entered: list[str] = []
    layout = make_layout(model, batch)
    with evaluating(model), _watching(model, candidates, calls, entered, layout), torch.no_grad():
        call(model, batch)
    order = [path for path in calls if path in candidates]
    for path in candidates.keys() - calls.keys():
        left[candidates[path].weight] = "no forward pass comes to it"
    places: list[Place] = []
    for path in order:
        place = candidates[path]
        why = _unfit(place, calls[path], layout)
        if why is None:
            places.append(place)
        else:
            left[place.weight] = why
    once = [path for path in entered if entered.count(path) == 1]
    return Survey(places, dict(sorted(left.items())), _outermost(once))


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any = field(default=None)


def _candidates(
    model: nn.Module, settings: Settings, keep: Mapping[str, str], left: dict[str, str]
) -> dict[str, Place]:
    """Return path -> place, of modules that may be calibrated as far as they themselves show."""
    convolutions = "convolutions" in settings.sites
    sites = find_sites(model, settings.layers, convolutions)
    left.update(sites.skipped)
    shared = _shared(model)
    found: dict[str, Place] = {}
    scalings = [s for s in find_scalings(model) if selected(s.name, settings.layers)]
    for site in (*sites.found, *scalings):
        own = dict(site.module.named_parameters(recurse=False))
        prefix = f"{site.path}." if site.path else ""
        weight = next((f"{prefix}{n}" for n, p in own.items() if p is site.weight), None)
        if weight is None or site.kind in ("in_projection", "out_projection"):
            left[site.name] = f"{type(site.module).__name__} calls no layer for it"
            continue
        bias = f"{prefix}bias" if own.get("bias") is not None else None
        scaling = site.kind == "scaling"
        why = _kept(weight, site, shared) or keep.get(weight)
        why = why or (keep.get(bias or "") if scaling else None)
        if why is not None:
            left[weight] = why
            continue
        kind = _KINDS.get(site.kind, "matrices")
        bias_may = bias is not None and bias not in keep and id(own["bias"]) not in shared
        bias_kind = "norms" if scaling else "biases"  # a norm's two vectors belong together
        place = Place(
            site, weight, bias, kind in settings.sites, bias_may and bias_kind in settings.sites
        )
        if place.parameters:
            found[site.path] = place
    return found


def _kept(weight: str, site: Site, shared: set[int]) -> str | None:
    if classification_head(weight) is not None:
        return "a head"
    if is_output_vocabulary(weight):
        return "an output vocabulary"
    if site.tied or id(site.weight) in shared:
        return "several modules share it"
    if site.kind == "linear" and type(site.module).forward is not nn.Linear.forward:
        return f"{type(site.module).__name__} has a forward of its own"
    return None


def _shared(model: nn.Module) -> set[int]:
    """Return the parameters that have several names."""
    seen: set[int] = set()
    found: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        found |= {id(parameter)} & seen
        seen.add(id(parameter))
    return found


@contextmanager
def _watching(
    model: nn.Module,
    candidates: Mapping[str, Place],
    calls: dict[str, list[_Call]],
    entered: list[str],
    layout: Layout,
) -> Iterator[None]:
    """Note every call of the candidates, and every entry into a repeated module."""

    def note(path: str, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        calls.setdefault(path, []).append(_Call(args, kwargs, outputs))

    def enter(path: str, module: nn.Module, args: Any) -> None:
        entered.append(path)

    handles: list[Any] = []
    for path, module in model.named_modules():
        if path in candidates:
            handles.append(module.register_forward_hook(partial(note, path), with_kwargs=True))
        if isinstance(module, nn.ModuleList):
            for name, child in module.named_children():
                inner = f"{path}.{name}" if path else name
                handles.append(child.register_forward_pre_hook(partial(enter, inner)))
    handles += watch_encoder(model, lambda: layout)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch_encoder(model: nn.Module, layout: Callable[[], Layout | None]) -> list[Any]:
    """Note what an encoder returns to its decoder in the layout of the pass; the handles."""
    find = getattr(model, "get_encoder", None)
    if not (is_encoder_decoder(model) and callable(find)):
        return []
    encoder = find()

    def note(module: nn.Module, args: Any, outputs: Any) -> None:
        own, states = layout(), outputs if isinstance(outputs, Tensor) else outputs[0]
        if own is not None and isinstance(states, Tensor):
            own.encoder_outputs.append(states)

    assert isinstance(encoder, nn.Module)
    return [encoder.register_forward_hook(note)] if encoder is not model else []


@torch.no_grad()
def _unfit(place: Place, calls: Sequence[_Call], layout: Layout) -> str | None:
    """Say why a layer that was called cannot be calibrated, if so."""
    if len(calls) > 1:
        return "it is called several times in a forward pass"
    one = calls[0]
    inputs = first_input(one.args, one.kwargs)
    if layout.tokens(place.site, as_matrix(place.site, inputs)) is None:
        return "its inputs fit no mask"
    if not place.scaling:
        return None
    outputs = one.outputs
    if not isinstance(outputs, Tensor) or outputs.shape[-1] != place.site.shape[1]:
        return "its channels are not on the last axis"
    v, u = scaling_parts(place, place.site.module, one.args, one.kwargs)
    expected = place.site.weight * v + u
    if place.bias is not None:
        expected = expected + place.site.module.get_parameter("bias")
    size = float(outputs.abs().max())
    if (
        outputs.shape != v.shape
        or float((expected - outputs).abs().max()) > _AFFINE_TOLERANCE * size
    ):
        return f"the output of {type(place.site.module).__name__} is not affine in its vectors"
    return None


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return what a layer was called with."""
    return args[0] if args else next(iter(kwargs.values()))


@torch.no_grad()
def scaling_parts(
    place: Place, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return v and u of a norm's output γ ∘ v + β + u for its input."""
    own = place.weight.rpartition(".")[2]
    zero = {name: torch.zeros_like(p) for name, p in module.named_parameters(recurse=False)}
    u: Tensor = functional_call(module, zero, args, dict(kwargs))
    one = {**zero, own: torch.ones_like(zero[own])}
    v: Tensor = functional_call(module, one, args, dict(kwargs))
    return v - u, u


def _outermost(paths: Sequence[str]) -> list[str]:
    kept = set(paths)

    def inside(path: str) -> bool:
        parts = path.split(".")
        return any(".".join(parts[:i]) in kept for i in range(1, len(parts)))

    return [path for path in paths if not inside(path)]
