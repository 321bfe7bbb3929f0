"""Batches: examples on the first axis, which tokens count, how activations divide into samples."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from eutectic.errors import RequestError, StatisticsError
from eutectic.models.arguments import LABELS, signature_of
from eutectic.models.sites import Site
from eutectic.models.unfit_inputs import unfit_in_words

Batch = Mapping[str, Any] | Sequence[Any] | Tensor
TokenMask = Callable[[Any], Tensor | None]
Unmatched = Literal["error", "all", "skip"]

IGNORED_LABEL = -100
LABEL_KEYS = LABELS


def sample_count(batch: Batch) -> int:
    """Return the number of examples of a batch: the first axis of its first tensor."""
    for value in tensors_by_name(batch).values():
        if isinstance(value, Tensor) and value.ndim > 0:
            return value.shape[0]
    raise RequestError(
        f"a batch must be a mapping, sequence or tensor with examples on the first axis; "
        f"got {type(batch).__name__} without any tensor."
    )


def call(model: torch.nn.Module, batch: Batch) -> Any:
    """Run the model on a batch: mappings as keywords, sequences as positions.

    Labels are left out where the model takes none: they are for a head of its own, or an objective.
    Tokens without a row and inputs that are too long are a RequestError.
    """
    with unfit_in_words(model, batch):
        if isinstance(batch, Tensor):
            return model(batch)
        if isinstance(batch, Mapping):
            return model(**{name: batch[name] for name in signature_of(model).taken(batch)})
        return model(*batch)


def transform(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """Return the batch with `function` applied to every tensor in it."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {k: function(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return [function(v) if isinstance(v, Tensor) else v for v in batch]


def examples(batch: Batch, start: int, stop: int) -> Batch:
    """Return a batch of the examples [start, stop)."""
    count = sample_count(batch)
    return transform(batch, lambda t: t[start:stop] if t.ndim > 0 and t.shape[0] == count else t)


def tensors_by_name(batch: Batch) -> dict[str, Any]:
    """Return what a batch holds by name; sequences by position."""
    if isinstance(batch, Tensor):
        return {"0": batch}
    if isinstance(batch, Mapping):
        return dict(batch)
    return {str(i): value for i, value in enumerate(batch)}


@dataclass(frozen=True)
class Tokens:
    """How one layer's activations divide into samples and tokens."""

    arrange: Callable[[Tensor], Tensor]  # features last -> [samples, tokens, features]
    mask: Tensor | None  # [samples, tokens], True where a token counts; None when all do
    pooled: bool = True  # the first axis holds samples, so that means per sample make sense


@dataclass
class Layout:
    """The masks of one batch, on the model's device."""

    samples: int
    first: Tensor | None  # [samples, tokens] of the encoder, or of the only text
    second: Tensor | None  # of the decoder
    paired: bool  # the model has an encoder and a decoder
    batch_first: bool = True  # which axis holds the samples when both fit
    unmatched: Unmatched = "error"  # what becomes of activations that fit no mask
    images: int | None = None  # how many, where the batch holds any
    # Of this forward pass: what reads them is cross-attention's, whatever its name.
    encoder_outputs: list[Tensor] = field(default_factory=list)

    def tokens(self, site: Site, activations: Tensor) -> Tokens | None:
        """Return how activations `[..., features]` divide, or None when they are to be skipped.

        `[samples, features]`: every row counts. `[samples·tokens, features]` and
        `[tokens, samples, features]` are recognised; further axes are flattened.
        """
        lead = tuple(activations.shape[:-1])
        # The towers of CLIP may see different numbers of images and texts.
        images = self.samples if self.images is None else self.images
        if lead == (images if site.role == "image" else self.samples,):
            return Tokens(lambda t: t.unsqueeze(1), None)
        if site.role == "image":
            arrange = _fit_samples(lead, images, self.batch_first)
            return Tokens(arrange or (lambda t: t.reshape(lead[0], -1, t.shape[-1])), None)
        preferred, other = self._preference(site, activations)
        for mask in (preferred, other):
            if mask is not None and (arrange := _fit(lead, mask, self.batch_first)) is not None:
                return Tokens(arrange, mask)
        arrange = _fit_samples(lead, self.samples, self.batch_first)
        if preferred is None and arrange is not None:
            return Tokens(arrange, None)
        if self.unmatched == "all":
            return Tokens(lambda t: t.reshape(1, -1, t.shape[-1]), None, pooled=False)
        if self.unmatched == "skip":
            return None
        masks = [f", mask {[*m.shape]}" for m in (self.first, self.second) if m is not None]
        raise StatisticsError(
            f"'{site.name}' sees inputs {[*activations.shape]}, which fit no mask of the batch "
            f"({self.samples} samples{''.join(masks)}).\n"
            "Leave the layer out, or pass unmatched='all' (count every row) or 'skip'."
        )

    def _preference(self, site: Site, activations: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if not self.paired:
            return self.first, None
        from_encoder = site.role in ("encoder", "cross") or any(
            same_memory(activations, output) for output in self.encoder_outputs
        )
        if from_encoder:
            # Sounds and images have no mask, and the decoder's says nothing about them.
            return self.first, None if self.first is None else self.second
        return self.second, self.first


def _fit(
    lead: tuple[int, ...], mask: Tensor, batch_first: bool
) -> Callable[[Tensor], Tensor] | None:
    samples, length = mask.shape
    if lead == (length, samples) and (samples != length or not batch_first):
        return lambda t: t.transpose(0, 1)
    nested = len(lead) > 1 and lead[0] == samples and math.prod(lead[1:]) == length
    if nested or lead == (samples * length,):
        return lambda t: t.reshape(samples, length, t.shape[-1])
    return None


def _fit_samples(
    lead: tuple[int, ...], samples: int, batch_first: bool
) -> Callable[[Tensor], Tensor] | None:
    if tokens_first(lead, {samples}, batch_first):
        return lambda t: t.transpose(0, 1)
    if samples and math.prod(lead) % samples == 0:
        # Windows and patches are split off sample by sample, so that the samples stay outermost.
        return lambda t: t.reshape(samples, -1, t.shape[-1])
    return None


def tokens_first(lead: Sequence[int], counts: Collection[int], batch_first: bool) -> bool:
    """Tell whether activations of shape `[*lead, features]` are `[tokens, samples, features]`.

    There may be as many samples as `counts` says; where both orders fit, `batch_first` decides.
    """
    return len(lead) == 2 and lead[1] in counts and (lead[0] not in counts or not batch_first)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which float32 stays float32, on whatever kind of device."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def token_means(arranged: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the tokens that count, `[samples, features]`; zero where none does.

    It is what statistics pool and what a router sees. Not a product with the mask: what padding
    holds may be NaN.
    """
    if mask is None:
        return arranged.mean(1)
    kept = mask.to(arranged.device).unsqueeze(-1)
    return torch.where(kept, arranged, 0).sum(1) / kept.sum(1).clamp(min=1)


def same_memory(left: Tensor, right: Tensor) -> bool:
    """Tell whether two living tensors are one view of the same memory."""
    return left is right or (
        left.data_ptr() == right.data_ptr()
        and left.shape == right.shape
        and left.stride() == right.stride()
        and left.dtype == right.dtype
    )


def layout(
    batch: Batch,
    paired: bool,
    token_mask: TokenMask | None = None,
    batch_first: bool = True,
    unmatched: Unmatched = "error",
) -> Layout:
    """Read the masks of a batch.

    The first mask is `attention_mask`, or what `token_mask(batch)` returns; without either, all
    tokens of `input_ids` count. The decoder's is `decoder_attention_mask`, or the positions whose
    label is not -100, or all of `decoder_input_ids`.
    """
    items, samples = tensors_by_name(batch), sample_count(batch)
    first = items.get("attention_mask") if token_mask is None else token_mask(batch)
    if token_mask is None and first is None and isinstance(items.get("input_ids"), Tensor):
        first = torch.ones_like(items["input_ids"], dtype=torch.bool)
    second = decoder_mask(items) if paired else None
    for name, mask in (("attention", first), ("decoder", second)):
        if mask is not None and (mask.ndim != 2 or mask.shape[0] != samples):
            raise RequestError(
                f"the {name} mask must be [samples, tokens] with {samples} samples, got "
                f"{[*mask.shape]}.\nPass token_mask=… to say which tokens count."
            )
    first, second = (None if mask is None else mask.bool() for mask in (first, second))
    images = len(pixels) if isinstance(pixels := items.get("pixel_values"), Tensor) else None
    return Layout(samples, first, second, paired, batch_first, unmatched, images)


def decoder_mask(items: Mapping[str, Any]) -> Tensor | None:
    """Return the decoder's mask `[samples, tokens]`, or None without decoder inputs."""
    if items.get("decoder_attention_mask") is not None:
        return items["decoder_attention_mask"]
    if (mask := predicting_positions(items.get("labels"))) is not None:
        return mask
    inputs = items.get("decoder_input_ids")
    return None if inputs is None else torch.ones_like(inputs, dtype=torch.bool)


def predicting_positions(labels: Any) -> Tensor | None:
    """Return which of a decoder's positions predict a label that counts, where labels are tokens.

    The decoder's input is the labels moved one to the right: the position that predicts label i
    counts when label i does.
    """
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        return labels != IGNORED_LABEL
    return None


def mask_policy(batch: Batch, paired: bool, token_mask: TokenMask | None) -> dict[str, str]:
    """Return, in words, where the masks of batches like this one come from."""
    items = tensors_by_name(batch)
    names = ("attention_mask", "input_ids")
    first = next((n for n in names if isinstance(items.get(n), Tensor)), "none")
    policy = {"tokens": "caller" if token_mask else "all" if first != names[0] else first}
    if paired:
        names = ("decoder_attention_mask", "labels", "decoder_input_ids")
        second = next((n for n in names if isinstance(items.get(n), Tensor)), "none")
        policy["decoder"] = {"decoder_input_ids": "all", "none": "all"}.get(second, second)
    return policy
