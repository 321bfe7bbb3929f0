"""What one module of a forward pass says about its tokens: how many, whose, and which count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, count
from operator import mul
from typing import Any

from torch import Tensor

from eutectic.models.arguments import (
    DECODER_MASK,
    ENCODER_MASK,
    ENCODER_OUTPUTS,
    ENCODER_STATES,
    MASKS,
    NO_TEXTS,
    OF_DECODER,
    TEXTS,
)
from eutectic.models.batches import predicting_positions


@dataclass(eq=False)
class Tower:
    """The models of one forward pass that pass evidence on to each other, as they see one input."""

    number: int = 0  # in the order in which they were entered
    running: dict[int, Tensor] = field(default_factory=dict)  # samples -> summed log-posteriors


@dataclass(eq=False)
class Frame:
    """One transformers model being run."""

    samples: int | None = None
    counts: frozenset[int] = frozenset()  # and how many of its other inputs: images beside texts
    # Which tokens count, `[samples, tokens]`, for the layers that it runs itself; in a model of an
    # encoder and a decoder those are the decoder's. None when all do.
    mask: Tensor | None = None
    cross_mask: Tensor | None = None  # of the encoder's tokens, for a decoder that reads them
    decodes: bool = False  # is, or has, a decoder that reads an encoder: `mask` is the decoder's
    lengths: frozenset[int] = frozenset()  # tokens a sample may have; empty: unknown
    # Whose evidence its own layers go on from. None where it has run several towers.
    tower: Tower | None = field(default_factory=Tower)
    inner: int = 0  # how many models it has run so far that were given nothing of one another
    numbers: Iterator[int] = field(default_factory=lambda: count(1))  # of a whole forward pass
    results: list[tuple[Frame, list[Tensor]]] = field(default_factory=list)  # innermost first

    def closed(self, inner: Frame, output: Any) -> None:
        """Note what a model inside has returned."""
        self.results += [*inner.results, (inner, list(_tensors(output)))]

    def of(self, x: Tensor) -> Frame:
        """Return the frame of the model inside whose output a layer's input is, or else this one.

        It is another one's for the projection of a tower's features.
        """
        memory = x.untyped_storage().data_ptr()
        for frame, outputs in self.results:
            if any(output.untyped_storage().data_ptr() == memory for output in outputs):
                return frame
        return self


def open_frame(
    given: Mapping[str, Any], names: tuple[str, ...], parent: Frame | None, batch_first: bool
) -> Frame:
    """Return the frame of a module with parameters `names`, called with `given` inside `parent`."""
    above = parent or Frame()
    own = _samples(given, batch_first)
    samples = above.samples if own is None else own
    inputs = [given[name] for name in (*TEXTS, *NO_TEXTS) if isinstance(given.get(name), Tensor)]
    counts = above.counts if own is None else frozenset({own, *map(len, inputs)})
    mask, known = _own_mask(given, names)
    # A model that is told nothing has the masks of the one that runs it, if it takes any.
    inherits = mask is None and known and above.samples == samples
    paired = any(name in names or name in given for name in OF_DECODER)
    decodes = paired or given.get(ENCODER_STATES) is not None
    cross = above.cross_mask
    if paired:
        cross = above.cross_mask if inherits and above.decodes else mask
        mask = _decoder_mask(given, cross, above)
    else:
        if inherits and decodes:
            mask = above.mask if above.decodes else None
        elif inherits:
            mask = above.cross_mask if above.decodes else above.mask
        cross = _flat(given.get(ENCODER_MASK), cross)
    lengths = above.lengths if own is None else _lengths(given, mask, cross)
    tower = _tower(given, parent)
    return Frame(samples, counts, mask, cross, decodes, lengths, tower, numbers=above.numbers)


def _own_mask(given: Mapping[str, Any], names: tuple[str, ...]) -> tuple[Tensor | None, bool]:
    """Return the mask `[samples, tokens]` that was passed, and whether one can be."""
    known = False
    for name, keeps in MASKS.items():
        if name in names or name in given:
            known = True
            value = given.get(name)
            if isinstance(value, Tensor) and value.ndim == 2:
                # torch's padding masks are True, or −inf, where tokens do not count.
                return (value.bool() if keeps else value == 0), True
    return None, known


def _flat(mask: Any, otherwise: Tensor | None) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else otherwise


def _decoder_mask(given: Mapping[str, Any], source: Tensor | None, above: Frame) -> Tensor | None:
    """Return which of the decoder's tokens count, as `collect` takes it."""
    mask = _flat(given.get(DECODER_MASK), predicting_positions(given.get("labels")))
    if mask is not None:
        return mask
    if above.decodes:
        return above.mask
    # Without input of its own, the decoder is given the encoder's, moved likewise.
    return source if all(given.get(name) is None for name in OF_DECODER) else None


def _samples(given: Mapping[str, Any], batch_first: bool) -> int | None:
    inputs = (given.get(name) for name in (*TEXTS, *NO_TEXTS))
    for value in (*inputs, hidden_states(given.get(ENCODER_OUTPUTS))):
        if isinstance(value, Tensor):
            return len(value)
    for value in given.values():
        if isinstance(value, Tensor) and value.ndim >= 2:
            return value.shape[1 if value.ndim == 3 and not batch_first else 0]
    return None


def _lengths(given: Mapping[str, Any], mask: Tensor | None, cross: Tensor | None) -> frozenset[int]:
    """Return how many rows one sample may have in a layer that sees all tokens in a row."""
    found: set[int] = set()
    for name in (*TEXTS, *OF_DECODER, ENCODER_STATES):
        value = given.get(name)
        if isinstance(value, Tensor):
            sizes = value.shape[1 : -1 if value.is_floating_point() else None]
            found.update(accumulate(sizes, mul))
    if all(given.get(name) is None for name in NO_TEXTS):
        # Masks of audio count its samples in time, of which the model makes fewer tokens.
        found |= {m.shape[1] for m in (mask, cross) if m is not None}
    return frozenset(found)


def _tower(given: Mapping[str, Any], parent: Frame | None) -> Tower:
    """Return the tower that a model belongs to: its parent's, its encoder's, or a further one.

    A model inside another goes on from it, and a decoder from its encoder. Another that is given
    nothing of the first, as the texts beside the images, starts anew; and what comes after both
    goes on from one of them only where it is given just its output.
    """
    if parent is None:
        return Tower()
    states = given.get(ENCODER_STATES)
    source = parent if states is None else parent.of(states)
    if states is not None and source.tower is not None:
        return source.tower
    parent.inner += 1
    if parent.inner == 1 and parent.tower is not None:
        return parent.tower
    parent.tower = None
    return Tower(next(parent.numbers))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)


def hidden_states(outputs: Any) -> Tensor | None:
    """Return the last hidden states `[samples, tokens, features]` of a model's outputs, if any."""
    if isinstance(outputs, Tensor):
        return outputs if outputs.ndim == 3 else None
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None and isinstance(outputs, tuple) and outputs:
        hidden = outputs[0]
    return hidden if isinstance(hidden, Tensor) and hidden.ndim == 3 else None
