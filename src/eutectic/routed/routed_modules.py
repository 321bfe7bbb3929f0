"""Routed layers: a base weight, thin experts beside it, and a router that picks one per sample."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eutectic.conventions import reads_encoder
from eutectic.errors import RequestError
from eutectic.models.batches import token_means, tokens_first
from eutectic.models.sites import Site
from eutectic.routed.forward_masks import Frame
from eutectic.routed.forward_pass import Call, Routing, uncompiled
from eutectic.routed.router import Router

# None: no expert. int: one expert for all. Long [N]: one each. Float [N, T]: a mixture each.
Choice = Tensor | int | None
_ALL = slice(None)


class Experts(nn.Module):
    """The thin experts of one layer and its router."""

    def __init__(
        self, name: str, up: Tensor, down: Tensor, router: Router, routing: Routing
    ) -> None:
        super().__init__()
        self.name = name  # in decisions
        self.up = nn.Parameter(up, requires_grad=False)  # B `[T, out, ρ]`
        self.down = nn.Parameter(down, requires_grad=False)  # F `[T, ρ, in]`
        self.router = router
        self.routing = routing
        self.crossed = reads_encoder(name.removesuffix(".weight"))

    # It reads context variables and dictionaries, which would be compiled anew for every layer.
    @uncompiled
    def choose(self, x: Tensor) -> Choice:
        """Return which expert each sample of `[N, P, in]` takes, and record it if asked to."""
        call = self.routing.call() or Call(self.routing, self.routing.settings())
        settings = call.settings
        if settings.mode == "oracle":
            return _named(settings.experts, len(x), x.device, call)
        if settings.mode == "base" and settings.decisions is None and settings.ballots is None:
            return None
        if call.held is not None and self.name in call.held.choices:
            return _repeated(call.held.choices[self.name], len(x))
        frame = self.routing.frame(x)
        group = (self.name if frame.tower is None else frame.tower.number, len(x))
        if group in call.voted:
            choice = call.voted[group].to(x.device)
        else:
            choice = settings.chosen(scores := self._scores(x, frame))
            if settings.ballots is not None:
                settings.ballots.setdefault(group, []).append((self.name, scores))
        if settings.decisions is not None:
            winner = choice.argmax(-1) if choice.is_floating_point() else choice
            settings.decisions.add(self.name, winner)
        if settings.mode == "base":
            return None
        call.choices[self.name] = choice
        return choice

    def _scores(self, x: Tensor, frame: Frame) -> Tensor:
        """Return scores `[N, T]`, summed over the layers passed so far if the model does so."""
        mask = frame.cross_mask if self.crossed else frame.mask
        fits = mask is not None and mask.shape == x.shape[:2]
        scores = self.router(token_means(x.float(), mask if fits else None))
        if not self.routing.accumulate or frame.tower is None:
            return scores
        running = frame.tower.running
        total = scores.log_softmax(-1)
        if len(x) in running:
            total = total + running[len(x)]
        running[len(x)] = total
        return total

    def add_to(self, y: Tensor, x: Tensor, choice: Choice, rows: slice = _ALL) -> Tensor:
        """Return y + B_t(F_t x) for `y [N, P, out]` and `x [N, P, in]`; `y` may be written to.

        Gathering the factors of every sample copies ρ(in + out) numbers a sample, which pays as
        soon as the sample has ρ tokens; below, samples are grouped by expert. `rows` are the part
        of the outputs that `y`, the base weight's, holds.
        """
        if choice is None:
            return y
        up, down = self.up[:, rows], self.down
        if isinstance(choice, int):
            return y + F.linear(F.linear(x, down[choice]), up[choice])
        if choice.is_floating_point():
            inner = F.linear(x, down.flatten(0, 1)).unflatten(-1, down.shape[:2])
            inner = inner * choice.to(inner.dtype)[:, None, :, None]
            return y + F.linear(inner.flatten(-2), up.permute(1, 0, 2).flatten(1))
        if torch.compiler.is_compiling() or x.shape[1] >= down.shape[1]:
            inner = torch.bmm(x, down[choice].mT)
            if y.requires_grad or not y.dtype == inner.dtype == up.dtype:
                return y + torch.bmm(inner, up[choice].mT)
            return y.baddbmm_(inner, up[choice].mT)
        for expert in choice.unique().tolist():
            samples = (choice == expert).nonzero().squeeze(1)
            shift = F.linear(F.linear(x[samples], down[expert]), up[expert])
            y = y.index_add(0, samples, shift.to(y.dtype))
        return y

    def arranged(self, x: Tensor) -> tuple[Tensor, bool]:
        """Return `[N, P, in]` and whether the first two axes were turned for it."""
        frame = self.routing.frame(x)
        samples, counts, lead = frame.samples, frame.counts, x.shape[:-1]
        first = lead[0]
        if tokens_first(lead, counts, self.routing.batch_first):
            return x.transpose(0, 1), True
        if samples is None or (len(lead) <= 2 and first in counts):
            return (x if x.ndim == 3 else x.reshape(first, -1, x.shape[-1])), False
        rows = lead.numel()
        # Rows alone must be one a sample or all its tokens: others were picked from the batch.
        picked = len(lead) == 1 and samples > 1 and frame.lengths
        whole = len(lead) < 2 or first % samples == 0  # tables of positions are no samples
        if rows % samples or not whole or (picked and rows // samples not in {1, *frame.lengths}):
            raise RequestError(
                f"'{self.name}' sees inputs {[*x.shape]}, which do not divide into {samples} "
                "samples.\nLeave this layer out of the routed ones."
            )
        return x.reshape(samples, rows // samples, x.shape[-1]), False


def _named(experts: tuple[int, ...], samples: int, device: torch.device, call: Call) -> Choice:
    if len(experts) == 1:
        return experts[0]
    if samples != len(experts) and not (call.generating and samples % len(experts) == 0):
        raise RequestError(
            f"oracle mode names {len(experts)} experts for a batch of {samples} samples.\n"
            "Name one expert, or one per sample."
        )
    return _repeated(torch.tensor(experts, device=device), samples)


def _repeated(choice: Tensor, samples: int) -> Tensor:
    """Return one row per sample where generation runs several continuations of each prompt."""
    if len(choice) == samples:
        return choice
    return choice.repeat_interleave(samples // len(choice), dim=0)


class RoutedLinear(nn.Module):
    """A linear layer with experts: y = W x + b + B_t(F_t x), t chosen per sample.

    Replaces `nn.Linear` and transformers' `Conv1D`, whose weight is stored `[in, out]`; weight and
    bias keep their names, so the state dict holds the base layer's own keys and `experts.*`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, base: nn.Module, experts: Experts, transposed: bool) -> None:
        super().__init__()
        self.register_parameter("weight", base._parameters["weight"])
        self.register_parameter("bias", base._parameters["bias"])
        self.experts = experts
        self.transposed = transposed
        # Its presence keeps torch's fused encoder kernel off, which would read past this module.
        self.register_forward_pre_hook(_stay_visible)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.shape[1 if self.transposed else 0]

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` for inputs `[..., in]`."""
        if x.ndim == 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        weight = self.weight.mT if self.transposed else self.weight
        tokens, turned = self.experts.arranged(x)
        y = F.linear(tokens, weight, self.bias)
        y = self.experts.add_to(y, tokens, self.experts.choose(tokens))
        return (y.transpose(0, 1) if turned else y).reshape(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        """Return the shape for `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _stay_visible(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    return None


class RoutedAttention(nn.Module):
    """`nn.MultiheadAttention` with experts on its packed in-projection.

    The query decides; its expert serves query, key and value. Same arguments, same results, same
    state dict keys (and `experts.*`).
    """

    _qkv_same_embed_dim = False  # tells torch's encoder layer not to take its fused kernel
    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None

    def __init__(self, base: nn.MultiheadAttention, experts: Experts) -> None:
        super().__init__()
        packed = base.kdim == base.vdim == base.embed_dim
        if not packed or base.bias_k is not None or base.add_zero_attn:
            raise RequestError(
                f"'{experts.name}': attention with separate projections, bias_kv or zero_attn "
                "cannot be routed.\nLeave it out of the routed layers."
            )
        self.embed_dim, self.num_heads = base.embed_dim, base.num_heads
        self.dropout, self.batch_first = base.dropout, base.batch_first
        self.register_parameter("in_proj_weight", base._parameters["in_proj_weight"])
        self.register_parameter("in_proj_bias", base._parameters["in_proj_bias"])
        self.out_proj = base.out_proj
        self.experts = experts
        self.register_forward_pre_hook(_stay_visible)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return attention outputs and, if asked, weights, as `nn.MultiheadAttention` does."""
        alone = query.ndim == 2
        parts = [x.unsqueeze(0) if alone else x for x in (query, key, value)]
        if not alone and not self.batch_first:
            parts = [x.transpose(0, 1) for x in parts]
        shape = (self.num_heads, -1)
        q, k, v = (x.unflatten(-1, shape).transpose(1, 2) for x in self._projected(*parts))
        mask = _attention_mask(key_padding_mask, attn_mask, q, k, alone)
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            mixed = F.dropout(weights, dropout) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if alone:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        choice, width = self.experts.choose(query), self.embed_dim
        inputs, rows = [query], [_ALL]
        if not query is key is value:
            inputs = [query, key, value]
            rows = [slice(i * width, (i + 1) * width) for i in range(3)]
        found: list[Tensor] = []
        for x, part in zip(inputs, rows, strict=True):
            bias = None if self.in_proj_bias is None else self.in_proj_bias[part]
            y = F.linear(x, self.in_proj_weight[part], bias)
            found.append(self.experts.add_to(y, x, choice, part))
        return tuple(found) if len(found) == 3 else found[0].chunk(3, dim=-1)


def _attention_mask(
    padding: Tensor | None, attn_mask: Tensor | None, q: Tensor, k: Tensor, alone: bool
) -> Tensor | None:
    """Return one additive mask for scores `[N, heads, L, S]`, or None."""
    total = None
    if attn_mask is not None:
        total = _additive(attn_mask, q.dtype)
        if total.ndim == 3:
            total = total.unflatten(0, q.shape[:2])
    if padding is not None:
        rows = _additive(padding.unsqueeze(0) if alone else padding, q.dtype)
        rows = rows.view(len(q), 1, 1, k.shape[2])
        total = rows if total is None else total + rows
    return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def install(
    model: nn.Module, layer: Site, up: Tensor, down: Tensor, router: Router, routing: Routing
) -> None:
    """Replace one layer of `model` by a routed one, which takes over its parameters."""
    experts = Experts(layer.name, up, down, router, routing)
    base = model.get_submodule(layer.path)
    replacement: nn.Module
    if layer.kind == "in_projection":
        assert isinstance(base, nn.MultiheadAttention)
        replacement = RoutedAttention(base, experts)
    else:
        replacement = RoutedLinear(base, experts, transposed=layer.kind == "conv1d")
    replacement.train(base.training)
    # One module may be called by several paths.
    for path, module in [*model.named_modules(remove_duplicate=False)]:
        if module is base:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)
