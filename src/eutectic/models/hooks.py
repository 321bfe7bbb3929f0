"""Hooks that show an observer what flows through a model's layers, and that always go away."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from eutectic.conventions import is_packed
from eutectic.models.sites import Site, is_encoder_decoder


class Observer(Protocol):
    """What receives the observations."""

    def observe(self, site: Site, inputs: Tensor, outputs: Tensor) -> None:
        """Take the inputs and outputs of one call of a layer; neither may be modified."""
        ...

    def encoder_output(self, states: Tensor) -> None:
        """Take what the encoder of an encoder-decoder model returned."""
        ...


@contextmanager
def observing(model: nn.Module, sites: Iterable[Site], observer: Observer) -> Iterator[None]:
    """Show every call of the sites' layers to `observer` while the context lasts.

    Layers are observed by forward hooks. `nn.MultiheadAttention` calls no layer for its
    projections: it gets, for the context's duration, a forward that computes both projections in
    the open and lets the original code do the rest (`_open_attention`). PyTorch's fused encoder
    path, which bypasses layers, is off meanwhile.

    Everything is undone on leaving, whatever happened inside.
    """
    attention: dict[nn.Module, dict[str, Site]] = {}
    with ExitStack() as undo:
        if torch.backends.mha.get_fastpath_enabled():
            torch.backends.mha.set_fastpath_enabled(False)
            undo.callback(torch.backends.mha.set_fastpath_enabled, True)
        for site in sites:
            for module in (site.module, *site.tied):
                if isinstance(module, nn.MultiheadAttention):
                    attention.setdefault(module, {})[_slot(site)] = site
                else:
                    hook = partial(_observe, site, observer)
                    handle = module.register_forward_hook(hook, with_kwargs=True)
                    undo.callback(handle.remove)
        for module, slots in attention.items():
            assert isinstance(module, nn.MultiheadAttention)
            own = {name: f for name, f in vars(module).items() if name == "forward"}
            module.forward = _open_attention(module, slots, observer)
            undo.callback(vars(module).update, own)
            undo.callback(vars(module).pop, "forward")
        if is_encoder_decoder(model) and callable(find := getattr(model, "get_encoder", None)):
            encoder = find()
            if isinstance(encoder, nn.Module) and encoder is not model:
                handle = encoder.register_forward_hook(partial(_observe_encoder, observer))
                undo.callback(handle.remove)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off; give every module its own mode back afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def requiring_gradients(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let gradients flow to `parameters`, frozen ones too, while the context lasts."""
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _observe(
    site: Site, observer: Observer, module: nn.Module, args: Any, kwargs: Any, outputs: Any
) -> None:
    observer.observe(site, args[0] if args else next(iter(kwargs.values())), outputs)


def _observe_encoder(observer: Observer, module: nn.Module, args: Any, outputs: Any) -> None:
    states = outputs if isinstance(outputs, Tensor) else outputs[0]
    if isinstance(states, Tensor):
        observer.encoder_output(states)


def _slot(site: Site) -> str:
    """Return which projection of an attention module a site stands for: q, k, v, qkv or out."""
    if site.kind == "out_projection":
        return "out"
    if site.name.endswith("]"):
        return site.name[-2]
    return "qkv" if is_packed(site.name) else site.name.rsplit(".", 1)[-1][0]


def _open_attention(
    module: nn.MultiheadAttention, slots: Mapping[str, Site], observer: Observer
) -> Callable[..., Any]:
    """Return a forward whose projections can be observed.

    The scaled products and every treatment of masks stay PyTorch's own: the inputs are projected
    here, passed through a twin module whose projections are identity matrices (exact in any
    dtype), and projected again here.
    """
    twin = _twin(module)

    def show(slot: str, inputs: Tensor, outputs: Tensor) -> None:
        if slot in slots:
            observer.observe(slots[slot], inputs, outputs)

    def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        whole: Tensor | None = getattr(module, "in_proj_weight", None)
        bias: Tensor | None = getattr(module, "in_proj_bias", None)
        if whole is not None and query is key and key is value:
            packed = nn.functional.linear(query, whole, bias)
            show("qkv", query, packed)
            projected = list(packed.chunk(3, dim=-1))
        else:
            own: list[Any] = [getattr(module, f"{part}_proj_weight", None) for part in "qkv"]
            weights = own if whole is None else whole.chunk(3)
            biases = [None] * 3 if bias is None else bias.chunk(3)
            projected = []
            for slot, x, w, b in zip("qkv", (query, key, value), weights, biases, strict=True):
                projected.append(nn.functional.linear(x, w, b))
                show(slot, x, projected[-1])
        heads, attention = twin(*projected, *args, **kwargs)
        outputs = nn.functional.linear(heads, module.out_proj.weight, module.out_proj.bias)
        show("out", heads, outputs)
        return outputs, attention

    return forward


def _twin(module: nn.MultiheadAttention) -> nn.MultiheadAttention:
    weight = module.out_proj.weight
    # Built without memory, so that no random number of the caller is spent on its weights.
    twin = nn.MultiheadAttention(
        module.embed_dim,
        module.num_heads,
        bias=False,
        add_zero_attn=module.add_zero_attn,
        batch_first=module.batch_first,
        device="meta",
        dtype=weight.dtype,
    )
    identity = torch.eye(module.embed_dim, device=weight.device, dtype=weight.dtype)
    twin.in_proj_weight = nn.Parameter(identity.repeat(3, 1), requires_grad=False)
    twin.out_proj.weight = nn.Parameter(identity, requires_grad=False)
    twin.bias_k, twin.bias_v = module.bias_k, module.bias_v
    return twin.eval()
