"""Guards adapters of matrices that the base keeps in stacks, or fused with others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.checkpoint.test_peft_kinds import ALL, CASES, DORA, llama, trained
from torch import Tensor, nn

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


# --- every kind, on single matrices of a base that keeps them packed -------------------------


class Mixture(nn.Module):
    """A mixture whose experts are modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Module()])
        self.model.layers[0].mlp = nn.Module()
        self.model.layers[0].mlp.experts = nn.ModuleList([nn.Module() for _ in range(3)])
        for expert in self.model.layers[0].mlp.experts:
            for role, (out, width) in (("gate", (8, 16)), ("up", (8, 16)), ("down", (16, 8))):
                setattr(expert, f"{role}_proj", nn.Linear(width, out, bias=role == "up"))
            expert.gate_proj.bias = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a Llama's tensors with q, k, v and gate, up in one, as Phi-3's files have them."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        module, _, rest = name.rpartition("_proj.")
        stem, _, role = module.rpartition(".")
        if role in ("q", "gate"):
            roles, into = (("q", "k", "v"), "qkv") if role == "q" else (("gate", "up"), "gate_up")
            parts = [tensors[f"{stem}.{own}_proj.{rest}"] for own in roles]
            found[f"{stem}.{into}_proj.{rest}"] = torch.cat(parts)
        elif role not in ("k", "v", "up"):
            found[name] = value
    return found


def stacked(tensors: dict[str, Tensor], model: str) -> dict[str, Tensor]:
    """Return a mixture's tensors in stacks, as the files of a model type have them."""

    def gate_up(e: int, kind: str) -> Tensor:
        gate, up = (tensors[f"{MODULE}.{e}.{role}_proj.{kind}"] for role in ("gate", "up"))
        return (
            torch.stack([gate, up], 1).flatten(0, 1)
            if model == "gpt_oss"
            else torch.cat([gate, up])
        )

    stacks = {
        f"{MODULE}.gate_up_proj": [gate_up(e, "weight") for e in range(3)],
        f"{MODULE}.down_proj": [tensors[f"{MODULE}.{e}.down_proj.weight"] for e in range(3)],
    }
    turned = model == "gpt_oss"
    found = {n: torch.stack([m.mT if turned else m for m in own]) for n, own in stacks.items()}
    found[f"{MODULE}.gate_up_proj_bias"] = torch.stack([gate_up(e, "bias") for e in range(3)])
    return found


def assert_merged(folder: Path, wanted: dict[str, Tensor]) -> None:
    """Check an adapter's weights on the base, which is written in the layout of `wanted`."""
    changed = 0
    with open_reader(folder / "base") as base:
        adapter = open_expert(folder / "adapter", base.index)
        assert adapter.entries.keys() <= wanted.keys()
        assert adapter.extra == {}
        for name, entry in base.entries.items():
            flat = base.read(name).float()
            ours = adapter.weight(name, base=flat, dtype=torch.float32)
            expected = wanted[name].float().reshape(-1)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)
            changed += not torch.equal(expected, flat)
            third = entry.numel // 3
            for start, stop in ((third, 2 * third), (0, third), (third, entry.numel)):
                part = adapter.delta(name, start, stop, base=flat[start:stop], dtype=torch.float32)
                torch.testing.assert_close(part, (ours - flat)[start:stop], rtol=1e-4, atol=3e-6)
        adapter.close()
    assert changed


def rewrite(folder: Path, tensors: dict[str, Tensor], config: dict[str, object] | None) -> None:
    base = folder / "base"
    save_file({n: t.contiguous() for n, t in tensors.items()}, base / "model.safetensors")
    (base / "config.json").unlink(missing_ok=True)
    if config is not None:
        (base / "config.json").write_text(json.dumps(config))


def held(folder: Path) -> dict[str, Tensor]:
    with open_reader(folder / "base") as base:
        return {n: base.read(n).view(e.shape).clone() for n, e in base.entries.items()}


ON_LLAMA = [
    case for case, (build, _, how) in CASES.items() if build is llama and how.items() >= ALL.items()
]
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 16}


@pytest.mark.parametrize("case", ON_LLAMA)
@pytest.mark.filterwarnings("ignore")  # PEFT's
def test_every_kind_on_a_base_with_fused_projections(tmp_path: Path, case: str) -> None:
    merged = trained(*CASES[case], tmp_path)
    rewrite(tmp_path, fused(held(tmp_path)), {"model_type": "phi3", **ATTENTION})
    assert_merged(tmp_path, fused(merged))


EXPERT_KINDS = {
    "lora": ("Lora", {"init_lora_weights": False}),
    "dora": ("Lora", DORA),
    "pissa": ("Lora", {"init_lora_weights": "pissa"}),
    "biases of B": ("Lora", {"lora_bias": True, "target_modules": ["gate_proj", "up_proj"]}),
    "biases": ("Lora", {"bias": "lora_only", "target_modules": ["up_proj"]}),
    "loha": ("LoHa", {}),
    "lokr": ("LoKr", {"r": 2}),
    "oft": ("OFT", {"oft_block_size": 4}),
    "boft": ("BOFT", {"boft_block_size": 4}),
    "hra": ("HRA", {"r": 2}),
    "hira": ("Hira", {}),
    "vera": ("Vera", {"r": 4, "save_projection": False}),
}


@pytest.mark.parametrize("model", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("case", EXPERT_KINDS)
@pytest.mark.filterwarnings("ignore")  # PEFT's
def test_every_kind_on_single_experts_of_stacks(tmp_path: Path, case: str, model: str) -> None:
    kind, options = EXPERT_KINDS[case]
    # One role alone, and only some experts: the others keep theirs.
    chosen = {"target_modules": r".*experts\.[02]\.(gate|down)_proj", **options}
    if isinstance(chosen["target_modules"], list):
        chosen["target_modules"] = [f"experts.1.{n}" for n in chosen["target_modules"]]
    merged = trained(Mixture, kind, chosen, tmp_path)
    rewrite(tmp_path, stacked(held(tmp_path), model), {"model_type": model})
    assert_merged(tmp_path, stacked(merged, model))


@pytest.mark.filterwarnings("ignore")  # PEFT's
def test_biases_of_fused_projections(tmp_path: Path) -> None:
    how = {**ALL, "bias": "lora_only", **DORA}
    merged = trained(qwen2, "Lora", how, tmp_path)
    rewrite(tmp_path, fused(held(tmp_path)), {"model_type": "phi3", **ATTENTION})
    assert_merged(tmp_path, fused(merged))


@pytest.mark.filterwarnings("ignore")  # PEFT's
def test_without_a_configuration_the_factors_tell_the_rows(tmp_path: Path) -> None:
    merged = trained(llama, "Lora", {**ALL, **DORA}, tmp_path)
    rewrite(tmp_path, fused(held(tmp_path)), None)
    assert_merged(tmp_path, fused(merged))


@pytest.mark.filterwarnings("ignore")  # PEFT's
def test_rows_that_nothing_tells_are_refused(tmp_path: Path) -> None:
    trained(*CASES["hra"], tmp_path)
    rewrite(tmp_path, fused(held(tmp_path)), None)
    with (
        open_reader(tmp_path / "base") as base,
        pytest.raises(CheckpointError, match="nothing says how many rows of it are q, k and v"),
    ):
        open_expert(tmp_path / "adapter", base.index)


@pytest.mark.filterwarnings("ignore")  # PEFT's
def test_merged_from_file_to_file_on_a_fused_base(tmp_path: Path) -> None:
    """In chunks and as matrices, two kinds together."""
    merged = trained(llama, "Lora", {**ALL, **DORA}, tmp_path)
    rewrite(tmp_path, fused(held(tmp_path)), {"model_type": "phi3", **ATTENTION})
    base = held(tmp_path)
    for method in ("task_arithmetic", "iso_c"):
        eutectic.merge(
            base=str(tmp_path / "base"),
            experts={n: str(tmp_path / "adapter") for n in "ab"},
            method=method,
            scale=0.5 if method == "task_arithmetic" else 1.0,
            output=tmp_path / method,
        )
        with open_reader(tmp_path / method) as out:
            for name, wanted in fused(merged).items():
                ours = out.read(name).view(wanted.shape)
                if method == "iso_c" and "_proj" in name:
                    both = torch.stack([wanted - base[name]] * 2)
                    wanted = base[name] + eutectic.merge_matrices("iso_c", both)
                torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
