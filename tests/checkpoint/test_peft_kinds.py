"""Guards that every kind of PEFT adapter gives the weights that PEFT's own merge gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eutectic.checkpoint.adapter_keys import bare_parameters
from eutectic.checkpoint.experts import open_expert
from eutectic.checkpoint.opening import open_reader
from eutectic.errors import CheckpointError

Build = Callable[[], nn.Module]


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=12, **sizes))


def mixture() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}
    parts = {"moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **parts))


def inputs_first() -> nn.Module:
    """A mixture that keeps its stacks [E, in, out], and both square ones and others."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}
    parts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads, **parts))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=30, **sizes))


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "image_size": 8}
    heads = {"num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**text, **heads}, vision_config={**vision, **heads, "patch_size": 4}
    )
    return CLIPModel(config)


class Convolutions(nn.Module):
    """Kernels of one and two dimensions, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, kernel_size=3)
        self.second = nn.Conv1d(8, 6, kernel_size=3)
        self.point = nn.Conv2d(8, 8, kernel_size=1)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x


LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
ALL = {"target_modules": LINEAR}
DORA = {"use_dora": True, "lora_alpha": 6}
STACKS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
# name -> model, kind of PEFT, its configuration
CASES: dict[str, tuple[Build, str, dict[str, Any]]] = {
    "dora": (llama, "Lora", {**ALL, **DORA, "use_rslora": True}),
    "dora, patterns": (llama, "Lora", {**ALL, **DORA, "rank_pattern": {"up_proj": 3}}),
    "dora, embedding": (llama, "Lora", {"target_modules": ["embed_tokens", "k_proj"], **DORA}),
    "dora, Conv1D": (gpt2, "Lora", {"target_modules": ["c_attn", "c_proj", "c_fc"], **DORA}),
    "dora, kernels": (Convolutions, "Lora", {"target_modules": ["first", "point", "last"], **DORA}),
    "dora, T5": (t5, "Lora", {"target_modules": ["q", "wi", "wo"], **DORA}),
    "dora, CLIP": (
        clip,
        "Lora",
        {"target_modules": ["q_proj", "fc1", "visual_projection"], **DORA},
    ),
    "pissa": (llama, "Lora", {**ALL, "init_lora_weights": "pissa", "lora_alpha": 6}),
    "pissa, Conv1D": (gpt2, "Lora", {"target_modules": ["c_attn"], "init_lora_weights": "pissa"}),
    "pissa and dora": (llama, "Lora", {**ALL, **DORA, "init_lora_weights": "pissa"}),
    "olora": (llama, "Lora", {**ALL, "init_lora_weights": "olora", "lora_alpha": 3}),
    "orthogonal": (llama, "Lora", {**ALL, "init_lora_weights": "orthogonal"}),
    "mica": (llama, "Lora", {**ALL, "init_lora_weights": "mica"}),
    "biases of B": (clip, "Lora", {"target_modules": ["q_proj", "fc1"], "lora_bias": True}),
    "trained tokens": (llama, "Lora", {**ALL, "trainable_token_indices": [5, 0, 39]}),
    "trained tokens, by table": (
        t5,
        "Lora",
        {"target_modules": ["q"], "trainable_token_indices": {"shared": [3, 1]}},
    ),
    "trained tokens alone": (
        llama,
        "TrainableTokens",
        {"token_indices": [7, 2], "target_modules": ["embed_tokens"]},
    ),
    "norms": (llama, "LNTuning", {"target_modules": ["input_layernorm", "norm"]}),
    "norms with biases": (clip, "LNTuning", {"target_modules": ["layer_norm1"]}),
    "stacks": (mixture, "Lora", {"target_modules": ["q_proj"], "lora_alpha": 6, **STACKS}),
    "one stack": (
        mixture,
        "Lora",
        {
            "target_modules": [],
            "target_parameters": ["experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2},
        },
    ),
    "stacks, inputs first": (inputs_first, "Lora", {"target_modules": ["q_proj"], **STACKS}),
    "bare matrix": (
        mixture,
        "Lora",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
    ),
    "adalora": (llama, "AdaLora", {**ALL, "init_r": 6, "target_r": 3, "total_step": 10}),
    "adalora, Conv1D": (gpt2, "AdaLora", {"target_modules": ["c_attn"], "total_step": 10}),
    "loha": (llama, "LoHa", {**ALL, "r": 3, "alpha": 5, "alpha_pattern": {"up_proj": 2}}),
    "loha, T5": (t5, "LoHa", {"target_modules": ["q", "wo"]}),
    "loha, kernels": (Convolutions, "LoHa", {"target_modules": ["first", "second", "point"]}),
    "loha, cores": (
        Convolutions,
        "LoHa",
        {"target_modules": ["first", "second", "last"], "r": 2, "use_effective_conv2d": True},
    ),
    "lokr": (llama, "LoKr", {**ALL, "r": 2, "alpha": 3, "rank_pattern": {"q_proj": 1}}),
    "lokr, both": (llama, "LoKr", {**ALL, "r": 1, "decompose_both": True, "decompose_factor": 4}),
    "lokr, whole": (clip, "LoKr", {"target_modules": ["q_proj", "fc2"], "r": 64}),
    "lokr, kernels": (
        Convolutions,
        "LoKr",
        {"target_modules": ["first", "second", "last"], "r": 1},
    ),
    "lokr, cores": (
        Convolutions,
        "LoKr",
        {"target_modules": ["first"], "r": 1, "use_effective_conv2d": True},
    ),
    "oft": (llama, "OFT", {**ALL, "oft_block_size": 4}),
    "oft, few terms": (llama, "OFT", {**ALL, "oft_block_size": 8, "num_cayley_neumann_terms": 3}),
    "oft, inverse": (llama, "OFT", {**ALL, "oft_block_size": 4, "use_cayley_neumann": False}),
    "oft, shared, bounded": (
        llama,
        "OFT",
        {**ALL, "oft_block_size": 4, "block_share": True, "coft": True, "eps": 0.5},
    ),
    "oft, embedding": (llama, "OFT", {"target_modules": ["embed_tokens"], "oft_block_size": 4}),
    "oft, kernels": (
        Convolutions,
        "OFT",
        {"target_modules": ["first", "last"], "oft_block_size": 2},
    ),
    "boft": (llama, "BOFT", {**ALL, "boft_block_size": 4}),
    "boft, T5": (
        t5,
        "BOFT",
        {"target_modules": ["q", "wo"], "boft_block_num": 2, "boft_block_size": 0},
    ),
    "boft, kernels": (
        Convolutions,
        "BOFT",
        {"target_modules": ["first", "last"], "boft_block_size": 2},
    ),
    "hra": (llama, "HRA", {**ALL, "r": 3}),
    "hra, orthogonal": (llama, "HRA", {**ALL, "r": 4, "apply_GS": True}),
    "hra, kernels": (Convolutions, "HRA", {"target_modules": ["first"], "r": 2}),
    "hira": (llama, "Hira", {**ALL, "r": 3}),
    "hira, Conv1D": (gpt2, "Hira", {"target_modules": ["c_attn", "c_proj"]}),
    "hira, embedding": (llama, "Hira", {"target_modules": ["embed_tokens"]}),
    "vera": (llama, "Vera", {**ALL, "r": 6}),
    "vera, drawn again": (
        llama,
        "Vera",
        {**ALL, "r": 6, "save_projection": False, "projection_prng_key": 3},
    ),
    "vera, Conv1D": (gpt2, "Vera", {"target_modules": ["c_attn", "c_fc"], "r": 6}),
    "vblora": (llama, "VBLoRA", {**ALL, "num_vectors": 12, "vector_length": 4, "r": 2}),
    "vblora, shares alone": (
        gpt2,
        "VBLoRA",
        {
            "target_modules": ["c_attn"],
            **{"num_vectors": 12, "vector_length": 4, "r": 2, "topk": 3},
            "save_only_topk_weights": True,
        },
    ),
    "fourierft": (llama, "FourierFT", {**ALL, "n_frequency": 30, "scaling": 20.0}),
    "fourierft, Conv1D": (gpt2, "FourierFT", {"target_modules": ["c_attn"], "n_frequency": 30}),
    "c3a": (llama, "C3A", {**ALL, "block_size": 4}),
    "miss": (llama, "Miss", {**ALL, "r": 4}),
    "miss, odd": (llama, "Miss", {**ALL, "r": 5}),
    "miss, mini": (llama, "Miss", {**ALL, "r": 4, "mini_r": 2, "init_weights": "mini"}),
    "miss, bat": (llama, "Miss", {**ALL, "r": 4, "init_weights": "bat"}),
    "shira": (llama, "Shira", {**ALL, "r": 1}),
}


def trained(build: Build, kind: str, options: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """Save a base and an adapter of random values on it; return the weights that PEFT merges."""
    import peft

    torch.manual_seed(0)
    model = build()
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder / "base")
    else:
        from safetensors.torch import save_file

        (folder / "base").mkdir()
        save_file(model.state_dict(), folder / "base" / "model.safetensors")
    wrapped = peft.get_peft_model(model, getattr(peft, f"{kind}Config")(**options))
    moved = False
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            moved = True
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    assert moved
    wrapped.save_pretrained(str(folder / "adapter"))
    return {k: v.clone() for k, v in wrapped.merge_and_unload().state_dict().items()}


def unpacked(name: str, merged: dict[str, Tensor]) -> Tensor | None:
    """Return one expert's matrix, as files keep it, of a stack in memory."""
    module, _, rest = name.rpartition(".experts.")
    if not rest:
        return None
    number, role = rest.removesuffix(".weight").split(".")
    if role == "down_proj":
        return merged[f"{module}.experts.down_proj"][int(number)]
    gate, up = merged[f"{module}.experts.gate_up_proj"][int(number)].chunk(2)
    return gate if role == "gate_proj" else up


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")  # PEFT's, about flags and embeddings
def test_same_weights_as_merge_and_unload(tmp_path: Path, case: str) -> None:
    merged = trained(*CASES[case], tmp_path)
    changed = 0
    with open_reader(tmp_path / "base") as base:
        adapter = open_expert(tmp_path / "adapter", base.index)
        for name, entry in base.entries.items():
            wanted = merged[name] if name in merged else unpacked(name, merged)
            assert wanted is not None, name
            flat = base.read(name).float()
            ours = adapter.weight(name, base=flat, dtype=torch.float32)
            wanted = wanted.float().reshape(-1)
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-6)
            wide = adapter.delta(name, base=flat.double(), dtype=torch.float64)
            assert wide.dtype == torch.float64
            torch.testing.assert_close(wide.float(), wanted - flat, rtol=1e-4, atol=3e-6)
            # Ranges are those of the whole, in whatever order they are read.
            third = entry.numel // 3
            for start, stop in ((third, 2 * third), (0, third), (third, entry.numel)):
                part = adapter.delta(name, start, stop, base=flat[start:stop], dtype=torch.float32)
                torch.testing.assert_close(part, (ours - flat)[start:stop], rtol=1e-4, atol=3e-6)
            changed += not torch.equal(wanted, flat)
        assert changed
        assert adapter.extra == {}
        adapter.close()


SEEDS = [
    ("fourierft", {**ALL, "n_frequency": 4}, "random_loc_seed"),
    ("vera", {**ALL, "r": 6, "save_projection": False}, "projection_prng_key"),
]


@pytest.mark.parametrize("case", ["shira", "vblora, shares alone"])
@pytest.mark.parametrize("place", [-1, 120, 0.0])
@pytest.mark.filterwarnings("ignore")
def test_places_that_are_not_there(tmp_path: Path, case: str, place: float) -> None:
    """They are refused before anything is computed: by the plan, and by the check of the file.

    torch would count a place below 0 from the end, and cut what follows the point.
    """
    from safetensors.torch import load_file, save_file

    import eutectic

    trained(*CASES[case], tmp_path)
    folder = tmp_path / "adapter"
    file = folder / "adapter_model.safetensors"
    kept = torch.float32 if isinstance(place, float) else torch.int64
    stored = {k: v.to(kept) if "indices" in k else v for k, v in load_file(file).items()}
    bounds = {k: 12 for k in stored} if "vblora" in case else {}
    for key, values in stored.items():
        if "indices" in key:
            values.view(-1)[-1] = place
    save_file(stored, file)
    if case == "shira":  # the last index is a column's
        with open_reader(tmp_path / "base") as base:
            shapes = {k.removesuffix(".weight"): e.shape for k, e in base.entries.items()}
        bounds = {
            k: next(s[1] for n, s in shapes.items() if k.startswith(f"base_model.model.{n}."))
            for k in stored
        }
    indices = [k for k in stored if "indices" in k]
    says = [f"'{k}' holds the index {place}, and 0 to {bounds[k] - 1} are allowed" for k in indices]
    if isinstance(place, float):
        says = [f"'{k}' holds float32, where indices are whole numbers" for k in indices]
    with pytest.raises(eutectic.EutecticError) as refused:
        eutectic.plan(
            base=str(tmp_path / "base"), experts={"a": str(folder)}, method="linear", scale=1.0
        )
    assert any(text in str(refused.value) for text in says)
    assert len(indices) == 1 or f"({len(indices) - 1} more tensor" in str(refused.value)
    assert str(folder) in str(refused.value)
    (alone,) = eutectic.check(folder)
    known = "vblora" in case or place <= 0
    assert [f.kind for f in alone.faults] == ["misplaced_indices"] * known
    assert "integers_held" not in {note.kind for note in alone.notes}
    (against,) = eutectic.check(folder, base=tmp_path / "base")
    assert [f.kind for f in against.faults] == ["misplaced_indices" if known else "other_base"]
    assert any(text in against.faults[0].what for text in says) or known


@pytest.mark.parametrize(("kind", "options", "field"), SEEDS)
@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
@pytest.mark.filterwarnings("ignore")
def test_seeds_that_no_generator_takes(
    tmp_path: Path, kind: str, options: dict[str, Any], field: str, seed: int
) -> None:
    import json

    import eutectic

    trained(llama, {"fourierft": "FourierFT", "vera": "Vera"}[kind], options, tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: seed}))
    says = rf"adapter_config.json: '{field}' .* got {seed}"
    with (
        open_reader(tmp_path / "base") as base,
        pytest.raises(CheckpointError, match=says),
    ):
        open_expert(tmp_path / "adapter", base.index)
    (checked,) = eutectic.check(tmp_path / "adapter")
    assert any(field in fault.what for fault in checked.faults)


# --- bare parameters of mixtures --------------------------------------------------------------


def stacks(folder: Path, *, version: str | None, square: bool, packed: bool) -> dict[str, Tensor]:
    """Write a base with a mixture and an adapter of its stacks by hand; return the deltas.

    PEFT before 0.19 took the axes as [E, in, out] in every model.
    """
    import json

    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    experts, width, inner, rank = 3, 6, 6 if square else 4, 2
    module = "model.layers.0.mlp.experts"
    shapes = {"gate_up_proj": (2 * inner, width), "down_proj": (width, inner)}
    old = version is None
    deltas: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for depth, name in (("base_layer.", "gate_up_proj"), ("", "down_proj")):
        out, inputs = shapes[name][::-1] if old else shapes[name]
        a, b = randn(rank * experts, inputs), randn(out, rank * experts)
        tensors[f"base_model.model.{module}.{depth}lora_A.weight"] = a
        tensors[f"base_model.model.{module}.{depth}lora_B.weight"] = b
        products = [
            b[:, e::experts] @ a[rank * e : rank * (e + 1)] * (6 / rank) for e in range(experts)
        ]
        deltas[f"{module}.{name}"] = torch.stack([p.mT if old else p for p in products])
    base = {name: torch.zeros_like(delta) for name, delta in deltas.items()}
    if not packed:
        apart: dict[str, Tensor] = {}
        for e in range(experts):
            gate, up = deltas[f"{module}.gate_up_proj"][e].chunk(2)
            down = deltas[f"{module}.down_proj"][e]
            for role, delta in (("gate", gate), ("up", up), ("down", down)):
                apart[f"{module}.{e}.{role}_proj.weight"] = delta.contiguous()
        deltas, base = apart, {name: torch.zeros_like(delta) for name, delta in apart.items()}
    base["model.norm.weight"] = torch.ones(width)
    (folder / "base").mkdir()
    save_file(base, folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "peft_version": version}
    config["target_parameters"] = [f"mlp.experts.{name}" for name in shapes]
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return deltas


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("version", ["0.19.1", None])
def test_both_orders_of_stacked_axes(
    tmp_path: Path, version: str | None, square: bool, packed: bool
) -> None:
    wanted = stacks(tmp_path, version=version, square=square, packed=packed)
    with open_reader(tmp_path / "base") as base:
        adapter = open_expert(tmp_path / "adapter", base.index)
        assert set(adapter.entries) == set(wanted)
        for name, delta in wanted.items():
            flat = torch.zeros(delta.numel())
            found = adapter.delta(name, base=flat, dtype=torch.float32)
            torch.testing.assert_close(found.view(delta.shape), delta, rtol=1e-5, atol=1e-6)
            part = adapter.delta(name, 5, 17, base=flat[5:17], dtype=torch.float32)
            torch.testing.assert_close(part, delta.reshape(-1)[5:17], rtol=1e-5, atol=1e-6)


def test_stacks_of_another_base_are_refused(tmp_path: Path) -> None:
    import json

    stacks(tmp_path, version="0.19.1", square=False, packed=True)
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "r": 3}))
    with open_reader(tmp_path / "base") as base, pytest.raises(CheckpointError, match="fit none"):
        open_expert(tmp_path / "adapter", base.index)


def test_bare_parameters_are_found_by_the_end_of_their_path() -> None:
    names = ["experts.up", "mlp.experts.down", "router.weight"]
    assert bare_parameters("a.mlp.experts", names) == ["down", "up"]
    assert bare_parameters("a.experts", names) == ["up"]
    assert bare_parameters("a.my_experts", names) == []


@pytest.mark.filterwarnings("ignore")  # PEFT's
@pytest.mark.parametrize("method", ["linear", "iso_c"])
def test_merged_from_file_to_file(tmp_path: Path, method: str) -> None:
    """One adapter applied is PEFT's merge; in chunks, as a matrix, and whatever reads it again."""
    import eutectic

    merged = trained(*CASES["pissa and dora"], tmp_path)
    out = tmp_path / "out"
    experts = {"a": str(tmp_path / "adapter")}
    eutectic.merge(
        base=str(tmp_path / "base"), experts=experts, method=method, scale=1.0, output=out
    )
    with open_reader(out) as found:
        for name in found.entries:
            ours = found.read(name)
            if method == "linear" or "proj" not in name:
                wanted = merged[name].reshape(-1)
                torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore")  # PEFT's
def test_a_change_of_a_base_that_has_an_adapter_itself(tmp_path: Path) -> None:
    """What is computed from the base is computed from the one that the recipe names, as it is."""
    import peft
    from transformers import LlamaForCausalLM

    import eutectic

    trained(llama, "Lora", {**ALL, "init_lora_weights": False}, tmp_path)
    first = tmp_path / "adapter"
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    whole = peft.PeftModel.from_pretrained(whole, str(first)).merge_and_unload()
    config = peft.LoraConfig(**{**ALL, **DORA, "init_lora_weights": False})
    wrapped = peft.get_peft_model(whole, config)
    for name, parameter in wrapped.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.1)
    wrapped.save_pretrained(str(tmp_path / "second"))
    merged = wrapped.merge_and_unload().state_dict()
    eutectic.merge(
        base=str(tmp_path / "base"),
        base_adapter=str(first),
        experts={"b": str(tmp_path / "second")},
        method="task_arithmetic",
        scale=1.0,
        output=tmp_path / "out",
    )
    with open_reader(tmp_path / "out") as found:
        for name in found.entries:
            wanted = merged[name].reshape(-1)
            torch.testing.assert_close(found.read(name), wanted, rtol=1e-5, atol=2e-6)
