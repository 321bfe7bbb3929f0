"""Pictures of a split as pixel values, without all of them in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor

from eutectic.errors import RequestError
from eutectic.evaluation.schema import Task
from eutectic.statistics.encode import open_image
from eutectic.statistics.rows import Row

KEPT_PIXELS = 1 << 26  # values of float32, of one split


class Pictures(Sequence[dict[str, Tensor]]):
    """Batches of pixel values, made when they are asked for; the first of them are kept."""

    def __init__(
        self, task: Task, rows: Sequence[Row], processor: Any, batch_size: int, mode: str
    ) -> None:
        self._task, self._rows, self._processor, self._mode = task, rows, processor, mode
        self._starts = range(0, len(rows), batch_size)
        self._room = KEPT_PIXELS
        self._kept: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = self._starts[index]
        if start not in self._kept:
            made = self._made(start)
            size = made["pixel_values"].numel()
            if size > self._room:
                return made
            self._room -= size
            self._kept[start] = made
        return self._kept[start]

    def _made(self, start: int) -> dict[str, Tensor]:
        column = self._task.columns.image
        rows = self._rows[start : start + self._starts.step]
        images = [open_image(row[column], self._mode) for row in rows]
        try:
            found = self._processor(images=images, return_tensors="pt")
        except (ValueError, TypeError) as error:
            sizes = sorted({getattr(image, "size", None) for image in images}, key=str)
            raise RequestError(
                f"task '{self._task.name}': rows {start + 1} to {start + len(rows)} cannot be made "
                f"one batch of pixels ({str(error).splitlines()[0]}).\nTheir sizes: "
                f"{', '.join(map(str, sizes[:5]))}; an image processor that resizes helps."
            ) from error
        return {"pixel_values": found["pixel_values"]}
