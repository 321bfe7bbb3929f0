"""The tensors of one checkpoint: types, copies, and with `--values` their numbers."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from eutectic import conventions_ties as habits
from eutectic.checking.configuration import floats_of, plain_dtype
from eutectic.checking.report import Finding
from eutectic.checkpoint.header import TensorEntry
from eutectic.checkpoint.reader import TensorSource
from eutectic.conventions_adapters import adapter_part
from eutectic.conventions_heads import is_buffer
from eutectic.errors import Fault, Note
from eutectic.planning.tied_groups import equal_tensors, is_output

Progress = Callable[[float, float, str], None]

_CHUNK = 1 << 22  # entries read at a time


def tensor_findings(source: TensorSource, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what headers show of tensors; tables that may be copies of each other are read."""
    entries = source.entries
    floats = floats_of(entries)
    if len(floats) > 1:
        counts = {plain_dtype(d): count for d, count in floats.items()}
        rare = min(counts, key=counts.__getitem__)
        few_names = [n for n, e in entries.items() if plain_dtype(e.dtype) == rare]
        yield Note("dtype_mixture", tuple(few_names), {"counts": counts, "rare": rare}, "warning")
    empty = [n for n, e in entries.items() if not e.numel]
    if empty:
        yield Note("empty_tensors", tuple(empty), level="warning")
    integers = [
        name
        for name, entry in entries.items()
        if not (entry.dtype.is_floating_point or is_buffer(name, len(entry.shape)))
        and adapter_part(name) is None  # indices of a change, which is merged
    ]
    if integers:
        yield Note("integers_held", tuple(integers))
    yield from _copies(source, config)


def _copies(source: TensorSource, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield tables and output layers that are one tensor twice, or two where one is meant."""
    entries = source.entries
    groups = equal_tensors(source)
    tied = habits.is_tied(config)
    tables: dict[tuple[int, ...], str] = {}
    for names in groups:
        matrix = len(entries[names[0]].shape) == 2
        if len(names) > 1 and matrix:
            yield Note("held_twice", tuple(names), {"tied": tied})
        if (
            matrix
            and any(habits.is_token_table(n) for n in names)
            and not any(map(is_output, names))
        ):
            tables.setdefault(entries[names[0]].shape, names[0])
    untied = tied and not habits.ties_by_file(str(config.get("model_type")))
    for names in groups:
        table = tables.get(entries[names[0]].shape)
        if untied and table is not None and all(map(is_output, names)):
            yield Note("untied_copies", (table, names[0]), level="warning")


def value_findings(
    source: TensorSource, entries: Mapping[str, TensorEntry], progress: Progress | None = None
) -> Iterator[Finding]:
    """Yield tensors with numbers that are not finite, and matrices of nothing but zeros.

    Everything is read once, piece by piece.
    """
    total, done = sum(entry.numel for entry in entries.values()), 0
    zeros: list[str] = []
    for name, entry in entries.items():
        if progress is not None:
            progress(done, total, name)
        if entry.dtype.is_floating_point or entry.dtype.is_complex:
            bad, first, zero = _looked_at(source, entry)
            if bad:
                yield Fault(
                    "not_finite",
                    "numbers that are not finite.",
                    name,
                    got=f"{bad}, first at {first}",
                )
            elif zero and sum(size > 1 for size in entry.shape) > 1:  # biases begin with zeros
                zeros.append(name)
        done += entry.numel
    if zeros:
        yield Note("all_zero", tuple(zeros), level="warning")


def _looked_at(source: TensorSource, entry: TensorEntry) -> tuple[str, int, bool]:
    """Return how many numbers are not finite, where the first one is, and if all are zero."""
    nans = infinite = 0
    first, zero = -1, entry.numel > 0
    for start in range(0, entry.numel, _CHUNK):
        values = source.read(entry.name, start, min(entry.numel, start + _CHUNK))
        values = values.float() if values.dtype.itemsize == 1 else values
        zero = zero and not bool(values.any())
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            nans += int(torch.isnan(values).sum())
            infinite += int(torch.isinf(values).sum())
            if first < 0:
                first = start + int((~finite).to(torch.uint8).argmax())
    told = [f"{count:,} {kind}" for count, kind in ((nans, "NaN"), (infinite, "Inf")) if count]
    return " and ".join(told) + (f" of {entry.numel:,}" if told else ""), first, zero
