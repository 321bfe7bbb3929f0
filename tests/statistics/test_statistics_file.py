"""Guards the file: what is in it, who can read it, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from tiny_models import assert_near, assert_same, batched, bert, examples
from torch import nn

from eutectic.checkpoint.reader import StateDictReader
from eutectic.errors import NumericalError, OutputError, StatisticsError
from eutectic.statistics import StatisticsFile, collect, load_statistics

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
KEY = QUERY.replace("query", "key")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.stats.safetensors"


def collected(path: Path | None, **arguments: Any) -> StatisticsFile:
    return collect(bert(), batched(examples("bert"), 3), path, **arguments)


def test_the_file_holds_what_memory_holds(path: Path) -> None:
    arguments = {"output_gradients": True, "fisher": True, "block_fisher": True}
    memory, file = collected(None, **arguments), collected(path, **arguments)
    assert file.path == path
    assert_same(memory, file, 0)
    assert memory.provenance == file.provenance
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]
    saved = memory.save(path.with_name("other.safetensors"))
    assert saved.path is not None
    assert saved.path.read_bytes() == path.read_bytes()


def test_plain_safetensors_reads_it(path: Path) -> None:
    collected(path)
    tensors = safetensors.torch.load_file(path)
    assert tensors[f"{QUERY}/input_sum"].dtype == torch.float32
    assert f"{KEY}/input_sum" not in tensors
    assert tensors["examples"].tolist() == sorted(tensors["examples"].tolist())
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["eutectic_statistics"])
    assert record["layers"][KEY]["inputs"] == QUERY
    assert record["layers"][KEY]["count"] == 25
    assert record["data"]["examples"] == 6


def test_provenance_names_the_checkpoint_the_data_and_the_masks(path: Path) -> None:
    file = collected(path)
    assert file.fingerprint == StateDictReader(bert().state_dict()).fingerprint()
    assert file.provenance["mask_policy"] == {"tokens": "attention_mask"}
    assert file.provenance["versions"]["torch"] == torch.__version__
    assert collected(None, fingerprint="abc").fingerprint == "abc"
    fewer = collect(bert(), batched(examples("bert")[1:], 3))
    assert fewer.provenance["data"]["fingerprint"] != file.provenance["data"]["fingerprint"]


def test_reading_is_lazy_and_partial(path: Path) -> None:
    file = collected(path, output_gradients=True)
    layer = file.read(KEY, only={"input_sum", "output_gradient_gram"})
    assert layer.gram is None and layer.gram_factor is None and layer.pooled_gram is None
    assert layer.input_sum is not None and layer.output_gradient_gram is not None
    assert layer.count == 25
    assert file.has(KEY, "gram") and file.has(KEY, "pooled_gram")
    assert not file.has(KEY, "fisher_diagonal") and not file.has("nobody", "gram")
    assert KEY in file and "nobody" not in file
    with pytest.raises(KeyError, match="Did you mean"):
        file[QUERY.replace("query", "quary")]
    copy = pickle.loads(pickle.dumps(file))  # noqa: S301
    assert_near(copy[KEY].dense_gram(), file[QUERY].dense_gram(), 0)


def test_few_tokens_are_stored_as_factors(path: Path) -> None:
    file = collect(bert(), batched(examples("bert", (4, 5)), 2), path, output_gradients=True)
    layer = file[QUERY]
    assert layer.gram is None and layer.gram_factor is not None
    assert layer.gram_factor.shape == (9, 16)
    names = {n.removeprefix(f"{QUERY}/") for n in file.tensors if n.startswith(QUERY)}
    assert names == {
        "gram_factor",
        "input_sum",
        "pooled_factor",
        "pooled_sum",
        "output_gradient_factor",
    }
    assert layer.pooled_gram.shape == layer.output_gradient_gram.shape == (16, 16)


def test_rank_keeps_directions_and_a_diagonal(path: Path) -> None:
    full, file = collected(None), collected(path, rank=4)
    for name in file:
        layer, exact = file[name], full[name].dense_gram()
        assert exact is not None
        if layer.gram_factor is not None and layer.gram_diagonal is not None:
            assert layer.gram_factor.shape == (4, len(exact))
            assert_near(layer.dense_gram().diagonal(), exact.diagonal())
            assert_near(layer.pooled_gram.diagonal(), full[name].pooled_gram.diagonal().double())
    assert file[QUERY].gram_diagonal is not None
    assert file["classifier.weight"].gram_diagonal is not None


def rewritten(path: Path, change: Any) -> Path:
    """Write the file again with `change(tensors, record)` applied."""
    tensors = safetensors.torch.load_file(path)
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["eutectic_statistics"])
    change(tensors, record)
    metadata = {"eutectic_statistics": json.dumps(record)}
    safetensors.torch.save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, r: r.update(format=99), "format 99"),
        (lambda t, r: r.pop("layers"), "incomplete .layers."),
        (lambda t, r: r["checkpoint"].clear(), "incomplete .checkpoint."),
        (lambda t, r: r["layers"][KEY].update(inputs="nobody"), "makes no sense"),
        (lambda t, r: r["layers"][KEY].update(count=-1), "makes no sense"),
        (lambda t, r: r["layers"].pop("classifier.weight"), "belongs to no layer"),
        (lambda t, r: t.update({f"{QUERY}/gram": torch.zeros(3, 3)}), r"\[3, 3\] does not fit"),
        (lambda t, r: t.update({f"{QUERY}/fisher_diagonal": torch.zeros(3)}), "does not fit"),
    ],
)
def test_files_that_contradict_themselves(path: Path, change: Any, message: str) -> None:
    collected(path)
    with pytest.raises(StatisticsError, match=message):
        load_statistics(rewritten(path, change))


def test_other_and_damaged_files(path: Path) -> None:
    with pytest.raises(StatisticsError, match="cannot be read"):
        load_statistics(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(StatisticsError, match="not safetensors"):
        load_statistics(path)
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    with pytest.raises(StatisticsError, match="not a statistics file"):
        load_statistics(path)
    path.unlink()
    collected(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(StatisticsError, match="truncated"):
        load_statistics(path)
    path.write_bytes(whole)
    file = load_statistics(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StatisticsError, match="ends early"):
        [file[name] for name in file]


def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collected(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        collected(None).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_output_that_cannot_be_written_fails_before_the_work(tmp_path: Path) -> None:
    calls: list[int] = []
    model = nn.Linear(2, 2)
    (tmp_path / "file").write_text("no folder")
    for target in (tmp_path / "file" / "x.safetensors", tmp_path):
        with pytest.raises(OutputError):
            collect(model, [torch.ones(1, 2)], target, progress=lambda *_: calls.append(1))
    assert calls == []


def test_sums_too_large_for_float32_are_refused() -> None:
    x = torch.full((4, 2), 3e19)
    with pytest.raises(NumericalError, match="--dtype float64"):
        collect(nn.Linear(2, 2).double(), [x.double()])
    layer = collect(nn.Linear(2, 2).double(), [x.double()], dtype=torch.float64)["weight"]
    assert layer.gram is not None and torch.isfinite(layer.gram).all()


def test_grams_may_be_read_in_the_rows_that_they_are_kept_in(path: Path) -> None:
    file = collected(path, rank=4, output_gradients=True)
    dense, thin = file[QUERY], file.read(QUERY, in_rows=True)
    assert thin.pooled_gram is None and thin.output_gradient_gram is None
    for statistic in ("gram", "pooled_gram", "output_gradient_gram"):
        assert thin.has(statistic)
        whole = dense.dense(statistic, torch.float32)
        assert whole is not None
        assert_near(thin.dense(statistic, torch.float32), whole)
    assert thin.pooled_factor is not None and thin.pooled_factor.shape[1] == 16
    only = file.read(QUERY, {"pooled_gram"}, in_rows=True)
    assert only.gram_factor is None and only.pooled_factor is not None
