"""Images of rows: where they lie, their pixels, and batches of them without all in memory."""

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

from torch import Tensor

from eutectic.data.columns import Row
from eutectic.errors import RequestError, StatisticsError, first_line
from eutectic.storage import view_once
from eutectic.storage.small_files import read_bytes

IMAGE_BYTES = 1 << 30  # of a picture's file
MOST_PIXELS = 178_956_970  # of a picture, as many as Pillow decodes unasked
KEPT_PIXELS = 1 << 26  # values of float32, of one split


def open_image(value: Any, mode: str = "RGB") -> Any:
    """Return an image in a mode of Pillow's, from a path, a file's bytes, or an image.

    A mapping with `bytes` or `path`, as `datasets` keeps images in parquet files, counts as what
    it holds. Other values are returned as they are.
    """
    value = _held(value)
    if not isinstance(value, str | Path | bytes):
        return _converted(value, mode) if hasattr(value, "convert") else value
    from PIL import Image

    shown = f"{len(value)} bytes" if isinstance(value, bytes) else value
    try:
        content = value if isinstance(value, bytes) else read_bytes(Path(value), IMAGE_BYTES)
        with warnings.catch_warnings():
            # Pillow warns of what it would refuse at twice the size; the bound here is one.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
                if width * height > MOST_PIXELS:
                    raise ValueError(f"{width:,} × {height:,} pixels, the limit is {MOST_PIXELS:,}")
                return _converted(image, mode)
    except MemoryError:
        raise
    except Exception as error:
        # Decoders raise anything at a damaged file: OSError, SyntaxError, struct.error, …
        raise StatisticsError(f"{shown}: not a readable image ({first_line(error)}).") from error


def locate_images(rows: Sequence[Row], column: str, source: str) -> Sequence[Row]:
    """Return the rows of a file with images that lie beside it named whole; others as they are."""
    file = view_once(source)
    if not file.is_file():
        return rows
    folder = view_once(file.parent)  # of an object store, what lies beside the file

    def located(row: Row) -> Row:
        value = _held(row.get(column))
        # Path.is_file would raise where a text is too long for a name.
        found = isinstance(value, str) and os.path.isfile(folder / value)  # noqa: PTH113
        return {**row, column: folder / value} if found else row

    return [located(row) for row in rows]


def image_inputs(
    values: Sequence[Any], processor: Any, mode: str, where: str = ""
) -> dict[str, Tensor]:
    """Return what an image processor makes of images in a mode; for values see `open_image`."""
    images = [open_image(value, mode) for value in values]
    try:
        return dict(processor(images=images, return_tensors="pt"))
    except (ValueError, TypeError) as error:
        sizes = sorted({getattr(image, "size", None) for image in images}, key=str)
        raise RequestError(
            f"{where} cannot be made one batch of pixels ({first_line(error)}).\n"
            f"Their sizes: {', '.join(map(str, sizes[:5]))}; an image processor that resizes helps."
        ) from error


class PixelBatches(Sequence[dict[str, Tensor]]):
    """Batches of pixel values, made when they are asked for; the first of them are kept."""

    def __init__(
        self, values: Sequence[Any], processor: Any, batch_size: int, mode: str, where: str
    ) -> None:
        self._values, self._processor, self._mode, self._where = values, processor, mode, where
        self._starts = range(0, len(values), batch_size)
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
            values = self._values[start : start + self._starts.step]
            where = f"{self._where}rows {start + 1} to {start + len(values)}"
            made = image_inputs(values, self._processor, self._mode, where)
            pixels = {"pixel_values": made["pixel_values"]}
            size = pixels["pixel_values"].numel()
            if size > self._room:
                return pixels
            self._room -= size
            self._kept[start] = pixels
        return self._kept[start]


def _converted(image: Any, mode: str) -> Any:
    """Return an image in a mode; of 16 bits the upper 8, where Pillow would make it white."""
    if image.mode.startswith("I"):
        import numpy as np
        from PIL import Image

        values = np.asarray(image)
        if values.max(initial=0) > 255:
            values = values >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image.convert(mode)


def _held(value: Any) -> Any:
    """Return the bytes or the path that a mapping holds; other values as they are."""
    if not isinstance(value, Mapping):
        return value
    stored = cast("Mapping[str, Any]", value)
    return stored.get("bytes") or stored.get("path") or value
