"""Guards LoRA on the single experts of mixtures that the base keeps packed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import eutectic
from eutectic.checkpoint.experts import open_expert
from eutectic.checkpoint.opening import open_reader
from eutectic.errors import CheckpointError

EXPERTS, WIDTH, INNER, RANK = 3, 6, 4, 2
ROLES = {"gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}
MODULE = "model.layers.0.mlp.experts"
# How adapters call the modules: as transformers 4 did, and as Mixtral's files do.
SPELLINGS = {
    "qwen3_moe": (MODULE, {role: f"{role}_proj" for role in ROLES}),
    "mixtral": (
        "model.layers.0.block_sparse_moe.experts",
        {"gate": "w1", "up": "w3", "down": "w2"},
    ),
    "gpt_oss": (MODULE, {role: f"{role}_proj" for role in ROLES}),
}
ADAPTED = {0: ("gate", "down"), 2: ("up",)}


def factors(seed: int) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        (e, role): (
            torch.randn(RANK, ROLES[role][1], generator=generator),
            torch.randn(ROLES[role][0], RANK, generator=generator),
        )
        for e, roles in ADAPTED.items()
        for role in roles
    }


def write(folder: Path, model: str, seed: int = 0, name: str = "adapter") -> dict[str, Tensor]:
    """Write a packed base and an adapter; return the changes of the base's tensors."""
    inputs_first, alternating = model == "gpt_oss", model == "gpt_oss"
    scaling = 6 / RANK
    single = {
        (e, role): torch.zeros(shape) for e in range(EXPERTS) for role, shape in ROLES.items()
    }
    path, called = SPELLINGS[model]
    stored: dict[str, Tensor] = {}
    for (e, role), (a, b) in factors(seed).items():
        single[e, role] = scaling * b @ a
        key = f"base_model.model.{path}.{e}.{called[role]}"
        stored |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    stacks: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": []}
    for e in range(EXPERTS):
        gate, up = single[e, "gate"], single[e, "up"]
        fused = torch.stack([gate, up], 1).flatten(0, 1) if alternating else torch.cat([gate, up])
        stacks["gate_up_proj"].append(fused)
        stacks["down_proj"].append(single[e, "down"])
    wanted = {
        f"{MODULE}.{n}": torch.stack([m.mT if inputs_first else m for m in own]).contiguous()
        for n, own in stacks.items()
    }
    generator = torch.Generator().manual_seed(9)
    base = {n: torch.randn(t.shape, generator=generator) for n, t in wanted.items()}
    base["model.norm.weight"] = torch.ones(WIDTH)
    for place, tensors in (("base", base), (name, stored)):
        (folder / place).mkdir(exist_ok=True)
        file = "model" if place == "base" else "adapter_model"
        save_file(tensors, folder / place / f"{file}.safetensors")
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": model}))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": ["w1"]}
    (folder / name / "adapter_config.json").write_text(json.dumps(config))
    return wanted


@pytest.mark.parametrize("model", SPELLINGS)
def test_each_product_stands_in_its_rows(tmp_path: Path, model: str) -> None:
    wanted = write(tmp_path, model)
    with open_reader(tmp_path / "base") as base:
        adapter = open_expert(tmp_path / "adapter", base.index)
        assert set(adapter.entries) == set(wanted)
        for name, delta in wanted.items():
            flat = torch.zeros(delta.numel())
            found = adapter.delta(name, base=flat, dtype=torch.float32)
            torch.testing.assert_close(found.view(delta.shape), delta, rtol=1e-5, atol=1e-6)
            for start, stop in ((5, 31), (48, 60), (0, 1)):
                part = adapter.delta(name, start, stop, base=flat[start:stop], dtype=torch.float64)
                torch.testing.assert_close(part.float(), delta.reshape(-1)[start:stop])


def test_merged_with_another_from_file_to_file(tmp_path: Path) -> None:
    first = write(tmp_path, "qwen3_moe", 0, "a")
    second = write(tmp_path, "qwen3_moe", 1, "b")
    experts = {n: str(tmp_path / n) for n in "ab"}
    eutectic.merge(
        base=str(tmp_path / "base"),
        experts=experts,
        method="task_arithmetic",
        scale=0.5,
        output=tmp_path / "out",
    )
    with open_reader(tmp_path / "base") as base, open_reader(tmp_path / "out") as out:
        for name in first:
            wanted = base.read(name) + 0.5 * (first[name] + second[name]).reshape(-1)
            torch.testing.assert_close(out.read(name), wanted, rtol=1e-5, atol=1e-6)


def test_another_base_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "qwen3_moe")
    with open_reader(tmp_path / "base") as base:
        kept = {n: base.read(n).view(e.shape) for n, e in base.entries.items()}
    cut = {n: t[:2] if t.ndim == 3 else t for n, t in kept.items()}  # fewer experts
    save_file({n: t.contiguous() for n, t in cut.items()}, tmp_path / "base/model.safetensors")
    with (
        open_reader(tmp_path / "base") as base,
        pytest.raises(CheckpointError, match="does not have"),
    ):
        open_expert(tmp_path / "adapter", base.index)
    wide = {n: t.repeat(1, 1, 2) if t.ndim == 3 else t for n, t in kept.items()}
    save_file(wide, tmp_path / "base/model.safetensors")
    with open_reader(tmp_path / "base") as base, pytest.raises(CheckpointError, match="do not fit"):
        open_expert(tmp_path / "adapter", base.index)
