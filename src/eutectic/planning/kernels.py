"""Convolutions as matrices over patches: which kernels are, in how many groups, what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from eutectic.checkpoint.index import TensorEntry
from eutectic.conventions_tensors import bias_beside, is_transposed_kernel
from eutectic.errors import Fault, Note
from eutectic.methods import get_method
from eutectic.planning.inputs import MergeRequest
from eutectic.planning.tensor_plan import TensorPlan
from eutectic.planning.treatment import Decision
from eutectic.types import Treatment

KERNEL = "kernel_as_matrix"
TRANSPOSED = "transposed_kernel_as_matrix"
_KINDS = ("convolution", "transposed_convolution")
_NO_STATISTICS = frozenset({"no_statistics"})


def with_kernels(entry: TensorEntry, decision: Decision, request: MergeRequest) -> Decision:
    """Return the decision for a kernel that the recipe takes as a matrix, and its groups.

    A kernel `[out, in/groups, *k]` is the matrix `[out, in·k]` of its patches, one for each group.
    No header says how many groups there are: statistics do, which have a Gram for each. Kernels of
    one channel may be a map of one input or one for every channel, so that without statistics they
    are averaged.

    A transposed convolution keeps `[in, out, *k]`: it maps the inputs of one position to a patch of
    outputs, by the matrix `[out·k, in]`, which lies transposed in the file, and its Gram is that of
    single positions of the input. Of several groups it keeps `[in, out/groups, *k]`, one below the
    other.
    """
    axes = len(entry.shape)
    if axes < 3 or decision.layout.stacked or decision.layout.split:
        return decision
    asked = request.recipe.convolutions == "matrix" and decision.treatment is Treatment.CONV
    if decision.treatment is not Treatment.MATRIX and (decision.ruled or not asked):
        return decision
    seen = _observed(entry, request)
    turned = _transposed_groups(entry, request, seen)
    if turned:
        layout = replace(decision.layout, transpose=True, groups=turned)
        reason = (Note(TRANSPOSED),) if asked else decision.reason
        decision = decision.because(*reason, treatment=Treatment.MATRIX)
        return replace(decision, layout=layout)
    groups = None if seen is None else seen[1]
    if asked:
        if groups is None and entry.shape[1] == 1:
            return decision.because(*decision.reason, Note("groups_unknown"))
        assumed = () if groups is not None else (Note("groups_assumed"),)
        decision = decision.because(Note(KERNEL), *assumed, treatment=Treatment.MATRIX)
    if groups is None or groups == 1 or entry.shape[0] % groups:
        return decision
    return replace(decision, layout=replace(decision.layout, groups=groups))


def _transposed_groups(
    entry: TensorEntry, request: MergeRequest, seen: tuple[str | None, int] | None
) -> int:
    """Return how many groups a transposed convolution has, 0 where a kernel is of another kind.

    Statistics that saw it say so. Else a bias does, which has as many entries as there are outputs;
    where inputs are as many, or no bias is there, only a name can say it.
    """
    if seen is not None and seen[0] is not None:
        return seen[1] if seen[0] == "transposed_convolution" else 0
    inputs, outputs = entry.shape[:2]
    bias = request.inputs.base.entries.get(bias_beside(entry.name))
    size = bias.shape[0] if bias is not None and len(bias.shape) == 1 else None
    if size in (None, inputs) and not (is_transposed_kernel(entry.name) and outputs > 1):
        return 0
    if size is None:
        return 1
    groups = size // max(outputs, 1)
    whole = outputs and size % outputs == 0 and groups and inputs % groups == 0
    return groups if whole else 0


def _observed(entry: TensorEntry, request: MergeRequest) -> tuple[str | None, int] | None:
    """Return the kind of a kernel and its groups, as statistics of any expert that saw it say.

    The kind is None where a Gram alone may be of either; None where none of them saw it.
    """
    for owner, statistics in request.inputs.statistics.items():
        own = request.statistics_names.get(owner, {}).get(entry.name)
        if own is None:
            continue
        counted = statistics.has(own, "gram")
        layers = statistics.provenance.get("layers")
        if layers is not None:
            from eutectic.statistics.statistics_file import groups_of

            kind = layers[own].get("kind")
            known = str(kind) if kind in _KINDS else None
            if known or counted:
                return known, groups_of(layers[own])
        elif counted:
            gram = statistics.read(own, {"gram"}).gram  # in memory, where nothing is read
            if gram is None:
                return None, 1
            return _kind_by_inputs(gram.shape, entry.shape), 1 if gram.ndim < 3 else len(gram)
    return None


def _kind_by_inputs(gram: Sequence[int], kernel: Sequence[int]) -> str | None:
    """Return the kind of kernel that sees the inputs of a Gram, None where it may be of either."""
    patch, inputs = math.prod(kernel[1:]), math.prod(gram[:-1])
    if (gram[-1] == patch) == (inputs == kernel[0]):
        return None
    return "convolution" if gram[-1] == patch else "transposed_convolution"


def rows_apart(planned: TensorPlan) -> bool:
    """Tell whether each row of a kernel sees channels of its own: a depthwise convolution."""
    return 1 < planned.layout.groups == planned.shape[0]


def kernel_faults(tensors: Sequence[TensorPlan], request: MergeRequest) -> list[Fault]:
    """Return why `convolutions: matrix` would change nothing, or would have no statistics."""
    if request.recipe.convolutions == "average":
        return []
    line = request.document.line("convolutions")
    kernels = [t for t in tensors if any(note.kind in (KERNEL, TRANSPOSED) for note in t.reason)]
    if not kernels:
        what = "no tensor that is merged is a convolution whose groups are known."
        choose = "Leave convolutions out, or give statistics with them (collect --convolutions)."
        return [Fault("no_convolution", what, "convolutions", line, next=choose)]
    if all(get_method(t.method).in_entries(t.parameters) and t.post is None for t in kernels):
        apart = sorted({t.method for t in kernels})[0]
        if any(note.kind == "kernels_of_one_row" for t in kernels for note in t.reason):
            what = "all convolutions here are depthwise, each row a map of its own, and "
            what += f"{request.method.name} averages single rows."
        else:
            what = f"{apart} works entry by entry, whatever shape the entries have."
        choose = "Leave convolutions out, or choose a method on matrices."
        return [Fault("convolutions_apart", what, "convolutions", line, next=choose)]
    without = [t for t in kernels if any(note.kind in _NO_STATISTICS for note in t.reason)]
    if without and len(without) == len(kernels) and request.recipe.fallback == "error":
        what = f"method '{request.method.name}' needs statistics of the convolutions of every "
        what += "expert, and of none are there any."
        choose = (
            "Collect them with --convolutions (eutectic collect EXPERT --data FILE --convolutions "
            "-o FILE), leave convolutions out, or choose fallback: allow."
        )
        return [Fault("statistics_needed", what, "convolutions", line, next=choose)]
    return []
