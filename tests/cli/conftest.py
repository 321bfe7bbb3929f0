from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from typer.testing import CliRunner

from eutectic.cli.main import app

Eutectic = Callable[..., Result]


@pytest.fixture
def eutectic() -> Eutectic:
    """Run the command line in this process."""
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and two experts, `base`, `a` and `b`; the working folder."""
    generator = torch.Generator().manual_seed(0)
    base = {"model.embed_tokens.weight": torch.randn(12, 8, generator=generator)}
    for i in range(3):
        layer = f"model.layers.{i}"
        name = f"{layer}.self_attention.a_very_long_name_of_a_projection.q_proj.weight"
        base[name] = torch.randn(8, 8, generator=generator)
        base[f"{layer}.mlp.down_proj.weight"] = torch.randn(8, 16, generator=generator)
        base[f"{layer}.norm.weight"] = torch.ones(8)
    for name in ("base", "a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {
            key: value
            + (0 if name == "base" else 0.01) * torch.randn(value.shape, generator=generator)
            for key, value in base.items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.chdir(tmp_path)
    return tmp_path
