"""Pictures in files of rows: by name, as bytes, and what only a function can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eutectic
from eutectic.errors import RequestError
from eutectic.evaluation import load_model, load_tasks, outputs, prepare
from eutectic.evaluation.rows import check_disjoint
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
