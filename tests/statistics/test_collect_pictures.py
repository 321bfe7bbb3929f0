"""Where the pictures lie that a file of rows names, for `collect` and `route` alike."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from eutectic.data.encoded_rows import BatchOptions, open_batches
from eutectic.data.images import locate_images
from eutectic.data.row_files import read_rows
from eutectic.errors import StatisticsError
from eutectic.models.loading import LoadedModel


def _shades(images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
    """An image processor that tells grey pictures apart."""
    return {"pixel_values": torch.tensor([image.getpixel((0, 0))[0] for image in images])}


def test_pictures_lie_beside_the_rows_or_where_their_names_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Identity()
    model.main_input_name, model.config = "pixel_values", SimpleNamespace()  # type: ignore[assignment]
    loaded = LoadedModel(model, "feature-extraction", _shades, {}, "")
    # The name `both.png` stands for two pictures: that beside the rows is meant.
    for name, grey in {"data/i/one.png": 51, "data/both.png": 102, "here/both.png": 255}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / name)
    Image.new("RGB", (8, 8), (153,) * 3).save(tmp_path / "here" / "only.png")
    monkeypatch.chdir(tmp_path / "here")

    def shades(names: list[str]) -> list[float]:
        rows = tmp_path / "data" / "rows.jsonl"
        rows.write_text("\n".join(json.dumps({"image": name}) for name in names))
        batches = open_batches(str(rows), loaded, BatchOptions(batch_size=8))
        return [shade for batch in batches for shade in batch["pixel_values"].tolist()]  # type: ignore[call-overload,index]

    whole = str(tmp_path / "data" / "i" / "one.png")
    assert shades(["i/one.png", "both.png", "only.png", whole]) == [51, 102, 153, 51]
    with pytest.raises(StatisticsError, match=r"nowhere\.png: not a readable image"):
        shades(["nowhere.png"])
    with pytest.raises(StatisticsError, match="not a readable image"):
        shades(["long" * 100])


def test_only_names_in_a_file_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"image": "a.png"}\n{"image": {"bytes": null, "path": "a.png"}}\n{"text": "a.png"}'
    )
    rows = read_rows(str(file))
    assert locate_images(rows, "image", "module:function") is rows
    assert locate_images(rows, "image", str(tmp_path)) is rows
    assert [row.get("image") for row in locate_images(rows, "image", str(file))] == [
        tmp_path / "a.png", tmp_path / "a.png", None,
    ]  # fmt: skip
