"""From what the command line names to what `collect` takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from torch import Tensor

from eutectic.models.batch import Batch
from eutectic.models.loading import LoadedModel
from eutectic.models.processors import image_mode, longest_input, takes_images
from eutectic.statistics.encode import Columns, EncodedRows, beside
from eutectic.statistics.rows import read_rows


def open_batches(
    source: str,
    loaded: LoadedModel,
    *,
    columns: Columns,
    batch_size: int,
    max_length: int | None = None,
    max_examples: int | None = None,
    split: str | None = None,
    trust_code: bool = False,
    needs_labels: bool = False,
    classes: int | None = None,
) -> Iterable[Batch]:
    """Return batches of a data set for a loaded model; see `rows.read_rows` for sources.

    Pictures that a file names lie beside it, or else where the name says. A function that returns
    mappings of tensors is taken to yield ready batches. Labels are looked at only if
    `needs_labels`: without gradients, or with drawn labels, any or none will do. `classes`
    is how many there are where a head of its own decides that, not the configuration.

    Raises:
        RequestError, StatisticsError, MissingExtraError: as `read_rows` and `EncodedRows`.
    """
    rows = read_rows(source, split=split, trust_code=trust_code)
    if len(rows) and _is_batch(rows[0]):
        return rows
    if max_examples is not None and len(rows) > max_examples:
        rows = list(islice(rows, max_examples))
    pictures = takes_images(loaded.model)
    if pictures:
        rows = beside(rows, columns.image, source)
    return EncodedRows(
        rows,
        loaded.processor,
        loaded.task,
        columns,
        batch_size,
        max_length or longest_input(loaded.processor, loaded.model.config),
        loaded.label_ids,
        image_mode(loaded.model.config) if pictures else None,
        needs_labels,
        _classes(loaded.model.config) if classes is None else classes if classes > 1 else None,
    )


def _classes(config: Any) -> int | None:
    """Return how many classes a label is one of; None where labels are numbers or sets."""
    count = getattr(config, "num_labels", None)
    if getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        return None
    return count if isinstance(count, int) and count > 1 else None


def _is_batch(item: Any) -> bool:
    return isinstance(item, Mapping) and any(isinstance(v, Tensor) for v in item.values())
