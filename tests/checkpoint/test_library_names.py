"""Guards that names which transformers alone relates meet, and that it is asked only then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eutectic.checkpoint import library_names
from eutectic.checkpoint.experts import open_expert
from eutectic.checkpoint.index import open_index
from eutectic.checkpoint.meeting import meet_names

transformers = pytest.importorskip("transformers", minversion="5")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One ViT as files have it, and by the names that it has in memory."""
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
    )
    model = transformers.ViTForImageClassification(config)
    saved, held = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("held")
    model.save_pretrained(saved)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, held / "model.safetensors")
    (held / "config.json").write_text((saved / "config.json").read_text())
    return saved, held


def test_names_of_files_and_of_memory_meet(vit: tuple[Path, Path]) -> None:
    for base, own in (vit, vit[::-1]):
        index = open_index(base)
        found = open_expert(own, index)
        assert found.missing == ()
        assert not found.extra
        values = load_file(base / "model.safetensors")
        for name, tensor in values.items():
            assert torch.equal(found.read(name).view(tensor.shape), tensor), name
        assert "another version of transformers" in str(found.alignment)
        found.close()


def test_an_adapter_of_a_model_with_a_head_meets_the_bare_model(vit: tuple[Path, Path]) -> None:
    """Nothing meets before transformers is asked, so that nothing told the prefix."""
    saved, held = (open_index(folder) for folder in vit)
    base = [name.removeprefix("vit.") for name in saved.entries if name.startswith("vit.")]
    own = [name for name in held.entries if name.endswith("attention.q_proj.weight")]
    config = {**saved.config, "architectures": ["ViTModel"]}
    mapping, _ = meet_names(base, own, "the adapter", [config])
    query = "encoder.layer.{}.attention.attention.query.weight"
    assert mapping == {name: query.format(i) for i, name in enumerate(own)}


def test_not_asked_for_heads_or_unknown_models(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "vit", "architectures": ["ViTModel"]}
    asked: list[object] = []
    monkeypatch.setattr(library_names, "_asked", asked.append)
    assert (
        library_names.library_forms(["pooler.dense.weight"], ["classifier.weight"], [config]) == {}
    )
    assert library_names.library_forms(["a.weight"], [], [config]) == {}
    assert library_names.library_forms(["a.weight"], ["b.weight"], [{}]) == {}
    assert not asked
    assert library_names.library_forms(["a.weight"], ["b.weight"], [{}, config]) == {}
    assert asked == [config]


@pytest.mark.parametrize("named", ["Trainer", "logging", "AutoConfig", "__name__", "NoSuchModel"])
def test_nothing_but_a_model_is_called_by_a_name_of_a_file(named: str) -> None:
    config = {"model_type": "vit", "architectures": [named]}
    assert library_names.library_forms(["a.weight"], ["b.weight"], [config]) == {}
