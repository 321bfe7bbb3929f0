"""Guards that an expert is seen under the base's names, and that nothing of it disappears."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from eutectic.checkpoint.experts import Expert, is_adapter, open_expert
from eutectic.checkpoint.index import open_index
from eutectic.errors import CheckpointError

from .helpers import save_sharded

G = torch.Generator().manual_seed(1)
BASE = {
    "enc.w": torch.randn(4, 6, generator=G),
    "enc.b": torch.randn(6, generator=G).half(),
    "pool.w": torch.randn(3, generator=G),
    "ids": torch.arange(4),
}


def opened(tmp_path: Path, tensors: dict[str, Tensor]) -> Expert:
    for name, content in (("base", BASE), ("tuned", tensors)):
        (tmp_path / name).mkdir()
        save_file(content, tmp_path / name / "model.safetensors")
    return open_expert(tmp_path / "tuned", open_index(tmp_path / "base"))


def test_values_under_the_names_of_the_base(tmp_path: Path) -> None:
    tuned = {f"bert.{k}": v + 1 for k, v in BASE.items() if k != "pool.w"}
    tuned["classifier.weight"] = torch.ones(2, 4)
    expert = opened(tmp_path, tuned)
    assert set(expert.entries) == {"enc.w", "enc.b", "ids"}
    order = list(open_index(tmp_path / "base").entries)
    assert list(expert.entries) == [name for name in order if name != "pool.w"]
    assert expert.missing == ("pool.w",)
    assert list(expert.extra) == ["classifier.weight"]
    assert expert.read_extra("classifier.weight").tolist() == [1.0] * 8
    assert "'bert.'" in str(expert.alignment)
    assert not expert.is_delta
    assert expert.factors("enc.w") is None
    assert expert.folder == tmp_path / "tuned"
    assert torch.equal(expert.read("ids"), BASE["ids"] + 1)
    expert.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_delta_and_weight_in_the_computing_type(tmp_path: Path, dtype: torch.dtype) -> None:
    tuned = {**BASE, "enc.b": (BASE["enc.b"] * 3).half(), "enc.w": BASE["enc.w"] * 2}
    expert = opened(tmp_path, tuned)
    for name in ("enc.w", "enc.b"):
        base = BASE[name].reshape(-1)[1:5].to(dtype)
        kept = base.clone()
        wanted = tuned[name].reshape(-1)[1:5].to(dtype)
        delta = expert.delta(name, 1, 5, base=base, dtype=dtype)
        assert delta.dtype == dtype
        assert torch.equal(delta, wanted - base)
        assert torch.equal(expert.weight(name, 1, 5, base=None, dtype=dtype), wanted)
        assert torch.equal(base, kept)


def test_other_shapes_are_seen_and_have_no_delta(tmp_path: Path) -> None:
    expert = opened(tmp_path, {**BASE, "pool.w": torch.ones(5)})
    assert expert.entries["pool.w"].shape == (5,)
    with pytest.raises(CheckpointError, match="'pool.w' has the shape"):
        expert.delta("pool.w", base=BASE["pool.w"], dtype=torch.float32)


def test_unknown_tensors(tmp_path: Path) -> None:
    expert = opened(tmp_path, {"enc.w": BASE["enc.w"]})
    with pytest.raises(CheckpointError, match="no tensor 'pool.w'"):
        expert.delta("pool.w", base=BASE["pool.w"], dtype=torch.float32)
    with pytest.raises(CheckpointError, match="no extra tensor 'x'"):
        expert.read_extra("x")


def test_expert_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="shares no tensor with the base"):
        opened(tmp_path, {"conv1.kernel": torch.ones(3)})


def test_sharded_expert_and_identity(tmp_path: Path) -> None:
    save_file(BASE, tmp_path / "model.safetensors")
    names = list(BASE)
    shards = {f"s{i}.safetensors": {n: BASE[n] for n in names[i::2]} for i in range(2)}
    save_sharded(tmp_path / "tuned", shards)
    (tmp_path / "tuned" / "config.json").write_text(json.dumps({"vocab_size": 4}))
    base = open_index(tmp_path / "model.safetensors")
    sharded = open_expert(tmp_path / "tuned", base)
    single = open_expert(tmp_path / "model.safetensors", base)
    assert sharded.fingerprint() == single.fingerprint()
    assert len(sharded.identity()) == 4
    assert sharded.config == {"vocab_size": 4}


def test_kinds_of_folders(tmp_path: Path) -> None:
    assert not is_adapter(tmp_path)
    assert not is_adapter(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert is_adapter(tmp_path)
