"""Pictures in files of rows: by name, as bytes, and what only a function can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import eutectic
from eutectic.data.images import open_image
from eutectic.errors import RequestError
from eutectic.evaluation import load_model, load_tasks, outputs, prepare
from eutectic.evaluation.splits import check_disjoint, split_rows
from evaluation import world


def _task(folder: Path, data: Any):
    spec = {"kind": "image-classification", "data": data}
    return load_tasks(world.tasks(folder / "one.yaml", a=spec))["a"]


def test_pictures_in_files_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    folder = world.save(world.make("vit"), tmp_path / "m")
    files = sorted(world.images(tmp_path / "i", 6).rglob("*.png"))
    labels = [file.parent.name for file in files]
    made = {
        "names.jsonl": [str(file.relative_to(tmp_path)) for file in files],
        "bytes.parquet": [file.read_bytes() for file in files],
        "datasets.parquet": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
    }
    monkeypatch.chdir("/")  # names are relative to the file of rows
    found = []
    for name, pictures in made.items():
        rows = [{"image": p, "label": n} for p, n in zip(pictures, labels, strict=True)]
        if name.endswith(".jsonl"):
            world.jsonl(tmp_path / name, rows)
        else:
            parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / name)
        task = _task(tmp_path, name)
        ready = prepare(task, "test", folder)
        found.append((ready.data_hash, outputs(load_model(folder, task), ready)))
    assert len({digest for digest, _ in found}) == 1
    assert all(torch.equal(found[0][1], values) for _, values in found)
    leak = {"test": "names.jsonl", "proxy": "bytes.parquet"}
    task = _task(tmp_path, leak)
    with pytest.raises(RequestError, match="proxy and test share 6 of 6"):
        check_disjoint(task)
    world.jsonl(tmp_path / "odd.jsonl", [{"image": [[0, 1]], "label": "no"}])
    task = _task(tmp_path, "odd.jsonl")
    with pytest.raises(RequestError, match="'image' holds a value of type list"):
        prepare(task, "test", folder)


def test_a_functions_images_need_not_be_readable_here(tmp_path: Path):
    world.save(world.make("bert"), tmp_path / "m")
    code = "def f(folder, rows):\n    return [float(row['image'][-1]) for row in rows]\n"
    (tmp_path / "f.py").write_text(code)
    for split, first in (("proxy", 0), ("test", 5)):
        rows = [{"image": f"s3://pictures/{i}"} for i in range(first, first + 4)]
        world.jsonl(tmp_path / f"{split}.jsonl", rows)
    data = {"proxy": "proxy.jsonl", "test": "test.jsonl"}
    spec = {"kind": "function", "function": "f.py:f", "data": data}
    path = world.tasks(tmp_path / "f.yaml", a=spec)
    found = eutectic.evaluate(path, models=[tmp_path / "m"], trust_code=True, resamples=0)
    assert found.results[0].value == np.mean([5, 6, 7, 8])
    shared = {"kind": "function", "function": "f.py:f", "data": data | {"validation": "v.jsonl"}}
    world.jsonl(tmp_path / "v.jsonl", [{"image": "s3://pictures/7", "note": "the same"}])
    path = world.tasks(tmp_path / "f.yaml", a=shared)
    with pytest.raises(RequestError, match="validation and test share 1"):
        eutectic.evaluate(path, models=[tmp_path / "m"], trust_code=True, resamples=0)


def test_pixels_beyond_a_bound_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    world.images(tmp_path / "i", 12)
    folder = world.save(world.make("vit"), tmp_path / "m")
    task = _task(tmp_path, "i")
    whole = prepare(task, "test", folder, batch_size=4)
    model = load_model(folder, task)
    assert whole.batches[0] is whole.batches[0]
    monkeypatch.setattr("eutectic.data.images.KEPT_PIXELS", 4 * 3 * 8 * 8)  # one batch
    bounded = prepare(task, "test", folder, batch_size=4)
    assert bounded.batches[0] is bounded.batches[0]
    assert bounded.batches[1] is not bounded.batches[1]
    assert len(bounded.batches) == 3 and len(bounded.batches[1:]) == 2
    for _ in range(2):
        assert torch.equal(outputs(model, bounded), outputs(model, whole))


def test_a_limit_takes_classes_of_a_folder_in_turn(tmp_path: Path):
    world.images(tmp_path / "i", 12)
    rows = split_rows(_task(tmp_path, "i"), "test", 5)
    assert [Path(r["image"]).name for r in rows] == [
        "001.png", "000.png", "002.png", "004.png", "003.png",
    ]  # fmt: skip
    assert [r["label"] for r in rows] == ["maybe", "no", "yes", "maybe", "no"]


def test_pictures_of_two_sizes_are_told_where_nothing_resizes(tmp_path: Path):
    world.images(tmp_path / "i", 4)
    Image.new("RGB", (5, 5)).save(tmp_path / "i" / "no" / "small.png")
    folder = world.save(world.make("vit"), tmp_path / "m")
    world.hf.ViTImageProcessor(do_resize=False).save_pretrained(folder)
    with pytest.raises(RequestError, match=r"rows 1 to 5 cannot be made one batch") as caught:
        list(prepare(_task(tmp_path, "i"), "test", folder).batches)
    assert "(12, 10), (5, 5)" in str(caught.value)


def test_of_sixteen_bits_the_upper_eight_are_seen():
    deep = np.arange(0, 2**16, 2**12, dtype=np.uint16).reshape(4, 4)
    for image in (Image.fromarray(deep), Image.fromarray(deep.astype(np.int32))):
        assert np.array_equal(np.asarray(open_image(image, "L")), deep >> 8)
        assert open_image(image).mode == "RGB"
    shallow = np.arange(16, dtype=np.int32).reshape(4, 4)
    assert np.array_equal(np.asarray(open_image(Image.fromarray(shallow), "L")), shallow)
