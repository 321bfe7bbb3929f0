"""A cheap identity of a checkpoint's content, independent of its layout on disk."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from eutectic.checkpoint.index import TensorEntry

_WINDOW_BYTES = 4096
_SAMPLE_WIDTH = 8
_SAMPLE_TOLERANCE = 1e-6  # of float32: an adapter's weight is computed, not stored


def sampled_fingerprint(
    entries: Mapping[str, TensorEntry], read: Callable[[str, int, int], Tensor]
) -> str:
    """Return a SHA-256 over names, types, shapes and samples of the data.

    Up to three windows of 4 KiB (start, middle, end) of every tensor are hashed, in the order of
    names: two checkpoints with equal fingerprints are the same for every practical purpose, but an
    edit confined to the unsampled inside of a tensor goes unseen. Sharding, file format and
    order do not matter. Cost: three small reads per tensor.
    """
    digest = hashlib.sha256()
    for name, entry in sorted(entries.items()):
        digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\0".encode())
        width = _WINDOW_BYTES // entry.dtype.itemsize
        for start, stop in _windows(entry.numel, width, range(3), 2):
            digest.update(read(name, start, stop).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _windows(count: int, width: int, places: range, parts: int) -> list[tuple[int, int]]:
    """Return ranges at `places` of `parts` of a tensor's length, or all of it where it is short."""
    if count <= len(places) * width:
        return [(0, count)]
    starts = [place * (count - width) // parts for place in places]
    return [(start, start + width) for start in starts]


def sample_ranges(count: int) -> list[tuple[int, int]]:
    """Return the few flat ranges of a tensor of `count` elements that a sample holds."""
    return _windows(count, _SAMPLE_WIDTH, range(1, 3), 3)


def sample_of(weight: Tensor) -> Tensor:
    """Return a few values of a tensor, 1-D, on the CPU."""
    flat = weight.detach().reshape(-1)
    return torch.cat([flat[start:stop] for start, stop in sample_ranges(len(flat))]).cpu()


def same_content(first: Tensor, second: Tensor) -> bool:
    """Tell whether two samples of a tensor's content can come from one tensor.

    They are compared in the coarser of their dtypes, so that a copy in half precision counts as
    the same and a fine-tune does not.
    """
    if first.shape != second.shape:
        return False
    coarse = max((first.dtype, second.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    x, y = first.to(coarse).double(), second.to(coarse).double()
    if torch.finfo(coarse).eps > torch.finfo(torch.float32).eps:
        return bool(x.nan_to_num().equal(y.nan_to_num()))
    largest = float(x.nan_to_num().abs().max()) if x.numel() else 0.0
    slack = _SAMPLE_TOLERANCE * largest
    return torch.allclose(x, y, rtol=_SAMPLE_TOLERANCE, atol=slack, equal_nan=True)
