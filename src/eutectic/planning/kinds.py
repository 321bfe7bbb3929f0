"""What a tensor is, and so how it is merged: by its axes, its name and the bias beside it."""

from collections.abc import Mapping
from typing import Any

from eutectic import conventions
from eutectic import conventions_tensors as tensors
from eutectic.checkpoint.index import TensorEntry
from eutectic.errors import Note
from eutectic.types import Treatment

Kind = tuple[Treatment, Note]

# A linear map has more inputs than this; a kernel `[out, in, k]` of fewer is nothing else.
_SHORT = 8
# Longer kernels than this have `conv` in their name in every library looked at.
_LONG = 32


def kind_of(entry: TensorEntry, config: Mapping[str, Any], held: Mapping[str, TensorEntry]) -> Kind:
    """Return the treatment that a tensor takes by what it is, and the reason.

    `held` are the tensors of the checkpoint, where the bias beside a weight tells what a name
    does not: a linear layer's has one axis, a stack's one more, a table has none. The reason's
    kind is `stack` for matrices stacked along the first axis, and `several_axes` for one linear map
    `[rows, *columns]`.
    """
    shape, name = entry.shape, entry.name
    if not entry.dtype.is_floating_point:
        return Treatment.COPY, Note("integers")
    if 0 in shape:
        return Treatment.COPY, Note("empty")
    if len(shape) < 2:
        return Treatment.VECTOR, Note("small")
    if name.endswith(conventions.IA3_SUFFIX):
        return Treatment.VECTOR, Note("ia3_vector")
    own, module, _ = tensors.holder(name)
    if own in ("bias", "gamma", "beta") or tensors.is_magnitude(name):
        return Treatment.VECTOR, Note("vectors")
    if own != "weight":
        return _of_parameter(name, own, module, shape)
    beside = held.get(tensors.bias_beside(name))
    bias = None if beside is None else beside.shape
    if bias == shape or (tensors.is_norm_module(module) and (bias is None or len(bias) != 1)):
        return Treatment.VECTOR, Note("vectors")
    if len(shape) > 3 or (bias is None and tensors.is_flat_kernel(module)):
        return Treatment.CONV, Note("convolution")
    if len(shape) == 3:
        return _of_three_axes(name, module, shape, bias, config)
    if bias is None and not conventions.is_output_vocabulary(name) and tensors.is_table(name):
        return Treatment.EMBEDDING, Note("table")
    return _map(name, shape)


def _map(name: str, shape: tuple[int, ...]) -> Kind:
    if min(shape[-2:]) == 1:
        return Treatment.VECTOR, Note("single_row")
    if conventions.is_text_projection(name):
        return Treatment.VECTOR, Note("text_projection")
    return Treatment.MATRIX, Note("stack") if len(shape) == 3 else Note("matrix")


def _of_three_axes(
    name: str,
    module: str,
    shape: tuple[int, ...],
    bias: tuple[int, ...] | None,
    config: Mapping[str, Any],
) -> Kind:
    """Return what a module's weight of three axes is: a kernel `[out, in, k]` or a stack."""
    if bias is not None:
        kernel = len(bias) == 1
    elif tensors.is_expert_stack(name):
        kernel = False
    elif tensors.is_kernel(name):
        kernel = True
    elif tensors.is_table(name) and shape[-1] >= _LONG:  # of positions in two directions
        return Treatment.EMBEDDING, Note("table")
    else:
        stack = tensors.is_linear_module(module) or shape[0] in tensors.expert_counts(config)
        kernel = shape[-1] < (_SHORT if stack else _LONG)
    return (Treatment.CONV, Note("convolution")) if kernel else _map(name, shape)


def _of_parameter(name: str, own: str, module: str, shape: tuple[int, ...]) -> Kind:
    """Return what a bare parameter of two axes and more is."""
    if tensors.is_expert_stack(name) and len(shape) == 3 and not tensors.is_vectors(own):
        return _map(name, shape)
    if tensors.is_table_parameter(own) or (own.startswith("weight") and tensors.is_table(name)):
        return Treatment.EMBEDDING, Note("table")
    if tensors.is_vectors(own):
        return Treatment.VECTOR, Note("vectors")
    if sum(length > 1 for length in shape) < 2:
        return Treatment.VECTOR, Note("single_row")
    if len(shape) == 2:
        kernel = tensors.is_kernel(module) and not tensors.is_linear_module(own)
        return (Treatment.CONV, Note("convolution")) if kernel else _map(name, shape)
    if tensors.has_heads_apart(name):
        return Treatment.MATRIX, Note("several_axes")
    if shape[0] == 1:  # a batch of one, which is what is learned of inputs: prompts, pads, tokens
        return Treatment.EMBEDDING, Note("table")
    kernel = tensors.is_kernel(name) or (shape[-1] < _SHORT and not tensors.is_map_parameter(own))
    if len(shape) > 3 or kernel:
        return Treatment.CONV, Note("convolution")
    return _map(name, shape)
