"""The linear maps of a model: which are observed, which can be routed, and what they are called."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from eutectic.conventions import (
    canonical_name,
    is_adapter_part,
    reads_encoder,
    reads_image,
)
from eutectic.conventions_patterns import fits
from eutectic.conventions_tensors import is_table_parameter, is_vectors

Kind = Literal[
    "linear",
    "conv1d",
    "convolution",
    "transposed_convolution",
    "in_projection",
    "out_projection",
    "scaling",
]
Role = Literal["encoder", "decoder", "cross", "image", "text"]

Convolution = nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d
_OBSERVED = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@dataclass(eq=False)
class Site:
    """One linear map of a model: a weight, and how inputs meet it.

    A packed in-projection whose query, key and value differ has three more sites, called
    `…in_proj_weight[q]`, `[k]` and `[v]`.
    """

    name: str  # of the parameter, as in the checkpoint
    path: str  # of the module
    module: nn.Module
    kind: Kind  # how inputs and outputs are read off
    role: Role  # which tokens it sees; `cross`: the encoder's, in the decoder; images have no mask
    shape: tuple[int, int]  # [out, in] of the linear map, whatever the weight's own layout
    weight: Tensor
    tied: list[nn.Module] = field(default_factory=list)  # they add to the same statistics
    groups: int = 1  # of a convolution, each a map of its own `[out / groups, in / groups]`

    def matrix(self, stored: Tensor) -> Tensor:
        """Return the map `[out, in]` of a layer from its parameter as stored; no convolution's."""
        return stored.mT if self.kind == "conv1d" else stored


@dataclass
class Sites:
    """What is observed, what was left out and why, and names that stand for another's weight."""

    found: list[Site]
    skipped: dict[str, str]
    aliases: dict[str, str]


def find_sites(
    model: nn.Module,
    patterns: Sequence[str] | None = None,
    convolutions: bool = False,
    every_kind: bool = False,
) -> Sites:
    """Return the linear layers of `model` in module order.

    `nn.Linear` and its subclasses, transformers' `Conv1D`, both projections of
    `nn.MultiheadAttention`, and (`convolutions`) `nn.Conv1d` and `nn.Conv2d`; those of several
    groups and transposed ones only where they are asked for (`every_kind`). Matrices that are
    multiplied in another way are listed as skipped. `patterns` are globs over parameter names;
    None observes all layers.
    """
    sites = Sites([], {}, {})
    by_weight: dict[tuple[int, str], Site] = {}
    observed: set[int] = set()
    for site in _linear_maps(model, convolutions, sites.skipped):
        turned = site.kind == "transposed_convolution"
        if (site.groups > 1 or turned) and not every_kind:
            sites.skipped[site.name] = f"{'transposed' if turned else 'grouped'} convolution"
            continue
        observed.add(id(site.weight))
        if not selected(site.name, patterns):
            continue
        part = site.name[site.name.find("[") :] if "[" in site.name else ""
        first = by_weight.setdefault((id(site.weight), part), site)
        if first is site:
            sites.found.append(site)
        else:
            first.tied.append(site.module)
            sites.aliases[site.name] = first.name
    sites.skipped = {**_unobservable(model, observed), **sites.skipped}
    sites.skipped = {n: why for n, why in sites.skipped.items() if selected(n, patterns)}
    return sites


def find_scalings(model: nn.Module) -> list[Site]:
    """Return the modules that scale each channel of their input, in module order: norms mostly.

    They have one vector of their own, or two of which the second is called bias, and nothing below
    them. Whether their output is affine in those vectors, as a norm's is, only a call can tell.
    """
    found: list[Site] = []
    encoder_decoder = is_encoder_decoder(model)
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        names, shapes = list(own), {tuple(p.shape) for p in own.values()}
        vectors = len(shapes) == 1 and len(next(iter(shapes))) == 1
        if not vectors or names[1:] not in ([], ["bias"]) or next(module.children(), None):
            continue
        if is_adapter_part(path) or not own[names[0]].is_floating_point():
            continue
        name = canonical_name(f"{path}.{names[0]}" if path else names[0])
        width = len(own[names[0]])
        role = _role(path, encoder_decoder)
        found.append(Site(name, path, module, "scaling", role, (width, width), own[names[0]]))
    return found


def routable_sites(model: nn.Module) -> list[Site]:
    """Return the layers to which experts can be added, in module order; tied ones each.

    Their modules can be replaced by ones that compute the same: `nn.Linear` itself, `Conv1D`, and
    both projections of `nn.MultiheadAttention` where the in-projection is packed.
    """
    found: list[Site] = []
    for site in _linear_maps(model, False, {}):
        module = site.module
        if isinstance(module, nn.MultiheadAttention):
            if getattr(module, "in_proj_weight", None) is None or "[" in site.name:
                continue
            if site.kind == "out_projection":  # a layer of its own, inside of the attention
                path = f"{site.path}.out_proj".lstrip(".")
                site = replace(site, path=path, module=module.out_proj)
        elif isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            continue
        found.append(site)
    return found


def _unobservable(model: nn.Module, observed: set[int]) -> dict[str, str]:
    """Return matrices that no linear layer multiplies by, with the module that holds them.

    Such are the packed experts of a mixture, which a function of the model's own multiplies.
    Tables and convolutions are known to be none, by module or by name.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag, *_CONVOLUTIONS)):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            raw = f"{path}.{own}" if path else own
            matrix = parameter.ndim in (2, 3) and min(parameter.shape) > 1
            if not matrix or id(parameter) in observed or not parameter.is_floating_point():
                continue
            if not (is_table_parameter(own) or is_vectors(own) or is_adapter_part(raw)):
                kind = type(module).__name__
                found[canonical_name(raw)] = f"no linear layer: {kind} multiplies by it itself"
    return found


def selected(name: str, patterns: Sequence[str] | None) -> bool:
    """Tell whether a parameter's name matches one of the globs (None matches all)."""
    return patterns is None or any(fits(name, p) for p in patterns)


def named_parameters(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Return the floating-point parameters by canonical name, tied ones once, adapters' aside."""
    found: dict[str, nn.Parameter] = {}
    for raw, parameter in model.named_parameters():
        name = canonical_name(raw)
        if parameter.is_floating_point() and not is_adapter_part(raw):
            if selected(name, patterns):
                found.setdefault(name, parameter)
    return found


def as_matrix(site: Site, inputs: Tensor) -> Tensor:
    """Return the inputs with features last: patches of a convolution, else unchanged.

    A convolution's `[B, C, *spatial]` becomes `[B, positions, C·k·k]`, in the order of
    `weight.flatten(1)`, group after group; a transposed one's `[B, positions, C]`, since each
    position of its input is multiplied by itself, and makes a patch of outputs.
    """
    if site.kind == "transposed_convolution":
        return _positions(site, inputs)
    return _patches(site, inputs) if site.kind == "convolution" else inputs


def output_rows(site: Site, outputs: Tensor) -> Tensor:
    """Return outputs (or their gradients) with features last, matching `as_matrix`.

    Of a transposed convolution these are patches `[B, positions, out·k·k]`: a position's gradient
    is that of all outputs which it adds to.
    """
    if site.kind == "transposed_convolution":
        return _patches(site, outputs)
    return _positions(site, outputs) if site.kind == "convolution" else outputs


def _positions(site: Site, values: Tensor) -> Tensor:
    """Return `[B, C, *spatial]` as `[B, positions, C]`."""
    if values.ndim == site.weight.ndim - 1:
        values = values.unsqueeze(0)
    return values.flatten(2).transpose(1, 2)


def _patches(site: Site, values: Tensor) -> Tensor:
    """Return what a kernel meets of `[B, C, *spatial]` at every position, `[B, positions, C·k·k]`.

    Of the outputs of a transposed convolution, what it makes of every position of its inputs.
    """
    module = site.module
    assert isinstance(module, _OBSERVED)
    if values.ndim == module.weight.ndim - 1:
        values = values.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    values = nn.functional.pad(values, _padding(module), mode=mode)
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    if len(kernel) == 1:
        values = values.unsqueeze(2)
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
    patches = nn.functional.unfold(values, kernel, dilation=dilation, stride=stride)
    return patches.transpose(1, 2)


def _padding(module: Convolution) -> list[int]:
    """Return the padding as `nn.functional.pad` takes it: last axis first, before and after."""
    sides: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if isinstance(module.padding, str):
            span = module.dilation[axis] * (module.kernel_size[axis] - 1)
            total = span if module.padding == "same" else 0
            sides += [total // 2, total - total // 2]
        else:
            sides += [module.padding[axis]] * 2
    return sides


def _linear_maps(model: nn.Module, convolutions: bool, skipped: dict[str, str]) -> Iterator[Site]:
    """Yield every linear map in module order, tied ones too; note why others are skipped."""
    encoder_decoder = is_encoder_decoder(model)
    attention_paths: set[str] = set()
    for path, module in model.named_modules():
        if is_adapter_part(path):
            continue
        name = canonical_name(f"{path}.weight" if path else "weight")
        role = _role(path, encoder_decoder)
        if isinstance(module, nn.MultiheadAttention):
            attention_paths.add(f"{path}.out_proj" if path else "out_proj")
            if type(module).forward is nn.MultiheadAttention.forward:
                yield from _attention_sites(path, module, role)
            else:
                reason = f"{type(module).__name__} has a forward of its own"
                skipped[canonical_name(f"{path}.in_proj_weight")] = reason
                skipped[canonical_name(f"{path}.out_proj.weight")] = reason
        elif path in attention_paths:
            continue
        elif isinstance(module, nn.Linear):
            if module.weight.is_floating_point():
                shape = (module.out_features, module.in_features)
                yield Site(name, path, module, "linear", role, shape, module.weight)
            else:
                skipped[name] = f"quantised weight ({module.weight.dtype})"
        elif _is_conv1d(module):
            assert isinstance(weight := module.weight, Tensor)
            shape = (weight.shape[1], weight.shape[0])
            yield Site(name, path, module, "conv1d", role, shape, weight)
        elif convolutions and isinstance(module, _CONVOLUTIONS):
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                weight, groups = module.weight, module.groups
                shape = (weight.shape[0], groups * weight[0].numel())
                yield Site(name, path, module, "convolution", role, shape, weight, groups=groups)
            elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d) and _in_step(module):
                weight, groups = module.weight, module.groups
                shape = (groups * weight[0].numel(), weight.shape[0])
                kind = "transposed_convolution"
                yield Site(name, path, module, kind, role, shape, weight, groups=groups)
            else:
                skipped[name] = f"{type(module).__name__}, which is not observed"


def _in_step(module: nn.ConvTranspose1d | nn.ConvTranspose2d) -> bool:
    """Tell whether its outputs have a patch for every position of its inputs, and no other."""
    steps = zip(module.output_padding, module.stride, strict=True)
    return all(beyond < stride for beyond, stride in steps)


def _attention_sites(path: str, module: nn.MultiheadAttention, role: Role) -> Iterator[Site]:
    prefix = f"{path}." if path else ""
    width, whole = module.embed_dim, getattr(module, "in_proj_weight", None)
    if whole is not None:
        maps = [("in_proj_weight", whole, *whole.shape)]
        maps += [(f"in_proj_weight[{part}]", whole, width, width) for part in "qkv"]
    else:
        parts = {name: getattr(module, name) for name in map("{}_proj_weight".format, "qkv")}
        maps = [(name, weight, *weight.shape) for name, weight in parts.items()]
    for own, weight, rows, columns in maps:
        name = canonical_name(f"{prefix}{own}")
        yield Site(name, path, module, "in_projection", role, (rows, columns), weight)
    out, name = module.out_proj, canonical_name(f"{prefix}out_proj.weight")
    shape = (out.out_features, out.in_features)
    yield Site(name, path, module, "out_projection", role, shape, out.weight)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Tell whether the model's configuration says that it has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def feeds_batch_first(model: nn.Module) -> bool:
    """Tell which axis holds the samples where both fit; torch's attention may take tokens first."""
    return all(m.batch_first for m in model.modules() if isinstance(m, nn.MultiheadAttention))


def _role(path: str, encoder_decoder: bool) -> Role:
    if reads_image(path):
        return "image"
    if not encoder_decoder:
        return "text"
    if reads_encoder(path):
        return "cross"
    first = next((part for part in path.split(".") if part in ("encoder", "decoder")), "decoder")
    return "encoder" if first == "encoder" else "decoder"


def _is_conv1d(module: nn.Module) -> bool:
    # By name, so that models of other libraries do not drag in transformers.
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
