"""Requests that are allowed and seldom meant: an expert twice, the base as one, a scale far out."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from eutectic.checkpoint.experts import Expert
from eutectic.checkpoint.index import TensorEntry
from eutectic.checkpoint.reader import TensorSource, sample_ranges
from eutectic.errors import CheckpointError, Note
from eutectic.planning.inputs import MergeRequest
from eutectic.recipes.schema import ScaleSearch

FAR = 5.0  # times the method's default scale
NEAR_ZERO = 0.01
WINDOWS, WIDTH = 64, 512  # parts of a tensor that are compared with the base, and entries of one


def mistakes(request: MergeRequest) -> list[Note]:
    """Return warnings of what a request most often says by mistake."""
    notes = _far_out(request)
    experts, base = request.inputs.experts, request.inputs.base
    groups: list[list[str]] = []
    listed = _lists_base(request)
    for name, expert in experts.items():
        if name in listed:
            continue
        if _is_base(expert, base):
            notes.append(Note("same_as_base", (name,), level="warning"))
            continue
        for group in groups:
            if _are_same(expert, experts[group[0]]):
                group.append(name)
                break
        else:
            groups.append([name])
    for group in groups:
        if len(group) > 1:
            notes.append(Note("same_expert", tuple(group), {"count": len(group)}, "warning"))
    return notes


def _lists_base(request: MergeRequest) -> set[str]:
    """Return the experts that are the base by intention: recipes of other kinds list it."""
    if request.script is None:
        return set()
    if request.inputs.rows:  # made of layers of several models
        return {*request.inputs.experts}
    experts, base = request.recipe.experts, request.recipe.reference
    return {name for name, spec in experts.items() if spec.path == base}


def _far_out(request: MergeRequest) -> list[Note]:
    """Return a warning of a stated scale that is far from the method's own, whatever its sign."""
    if request.recipe.scale is None or isinstance(request.recipe.scale, ScaleSearch):
        return []
    usual = request.method.default_scale(len(request.inputs.experts))
    if request.post is not None:
        usual = request.post.entry.default_scale
    if NEAR_ZERO * usual <= abs(request.scale) <= FAR * usual:
        return []
    numbers = {"scale": request.scale, "method": request.method.name, "usual": usual}
    return [Note("scale_far_out", (), numbers, "warning")]


def _is_base(expert: Expert, base: TensorSource) -> bool:
    """Tell whether a full checkpoint holds the base's tensors with the base's values."""
    if expert.is_delta or expert.missing or expert.extra:
        return False
    return _agree(expert, base, base.entries, _spread)


def _are_same(first: Expert, second: Expert) -> bool:
    if first.is_delta or second.is_delta:
        kinds = first.is_delta and second.is_delta and first.entries == second.entries
        return kinds and first.fingerprint() == second.fingerprint()
    if first.entries.keys() != second.entries.keys() or first.extra.keys() != second.extra.keys():
        return False
    if not _agree(first, second, first.entries, sample_ranges):
        return False
    return first.fingerprint() == second.fingerprint()


def _spread(count: int) -> Iterator[tuple[int, int]]:
    """Yield flat ranges all over a tensor: rows of a table may be all that an expert changed."""
    for start in range(0, count, max(count // WINDOWS, WIDTH)):
        yield start, min(count, start + WIDTH)


def _agree(
    first: Expert,
    second: Expert | TensorSource,
    entries: Mapping[str, TensorEntry],
    ranges: Callable[[int], Iterable[tuple[int, int]]],
) -> bool:
    """Compare parts of every tensor up to the first that differs.

    From the end: last layers are tuned most often.
    """
    for name in reversed(list(entries)):
        one, other = first.entries[name], second.entries[name]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        for start, stop in ranges(one.numel):
            try:
                if not torch.equal(first.read(name, start, stop), second.read(name, start, stop)):
                    return False
            except CheckpointError:
                return False  # told where it is read in full
    return True
