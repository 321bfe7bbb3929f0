"""What the forward methods of modules are given, under one name for each meaning.

transformers renames arguments from version to version and from model to model: the cache of
generation has been `past`, `past_key_values`, `cache_params` and `cache`. Here alone it is said
which arguments mean what. A cache is known by what it is, whatever it is called; other arguments
by the name that the signature has for them.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Name of a mask of tokens -> whether True (or 1) marks tokens that count.
MASKS: Mapping[str, bool] = {
    "attention_mask": True,
    "src_key_padding_mask": False,
    "key_padding_mask": False,
}
TEXTS = ("input_ids", "inputs_embeds")
NO_TEXTS = ("pixel_values", "input_features", "input_values")
OF_DECODER = ("decoder_input_ids", "decoder_inputs_embeds")
DECODER_MASK = "decoder_attention_mask"
ENCODER_MASK = "encoder_attention_mask"
ENCODER_STATES = "encoder_hidden_states"
ENCODER_OUTPUTS = "encoder_outputs"

LABELS = ("labels", "label", "label_ids")
# Not every model has a use for them. Tokenizers make the former unasked, for models that tell two
# texts apart; labels may be meant for a head in a file of its own.
_SPARED = ("token_type_ids", *LABELS)
# What models that keep no cache object call their lists of tensors.
_CACHES = (
    "cache",
    "past_key_values",
    "past_key_value",
    "cache_params",
    "layer_past",
    "past",
    "past_buckets_states",
    "state",
    "mems",
)
_CACHING = ("use_cache", "use_mems")  # ask a model to return a cache


@dataclass(frozen=True)
class Signature:
    """The names of a forward method's parameters, in order."""

    names: tuple[str, ...]
    others: bool = False  # it takes arguments of any other name, too

    def taken(self, names: Iterable[str]) -> list[str]:
        """Return the names of inputs without labels and the like that the method cannot take."""
        return [n for n in names if n not in _SPARED or n in self.names or self.others]

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by their names."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def without_cache(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the same call that neither gets a cache nor makes one."""
        kept = {k: v for k, v in given.items() if k not in _CACHES and not is_cache(v)}
        return kept | {name: False for name in _CACHING if name in self.names}


def signature_of(module: nn.Module) -> Signature:
    """Return the signature of a module's forward method, through what decorates it."""
    parameters = inspect.signature(module.forward).parameters
    others = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return Signature(tuple(parameters), others)


def is_cache(value: Any) -> bool:
    """Tell whether a value is an object that keeps keys and values, or states, of past tokens."""
    kind = type(value)
    named = any(ancestor.__name__.endswith("Cache") for ancestor in kind.__mro__)
    return named or hasattr(kind, "get_seq_length")


def given_cache(given: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a call: an object, or a sequence of tensors."""
    found = [value for value in given.values() if is_cache(value)]
    tensors = (given[name] for name in _CACHES if _holds_tensors(given.get(name)))
    return found[0] if found else next(tensors, None)


def returned_cache(output: Any) -> Any:
    """Return the cache object that a model's output holds, or None."""
    values = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, Mapping | tuple | list):
        return None
    return next((value for value in values if is_cache(value)), None)


def tokens_seen(cache: Any) -> int | None:
    """Return how many tokens a cache holds; None where it does not tell."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None


def _holds_tensors(value: Any) -> bool:
    while isinstance(value, tuple | list) and value:
        value = value[0]
    return isinstance(value, Tensor)
