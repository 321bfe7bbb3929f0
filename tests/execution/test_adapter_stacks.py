"""Guards adapters of mixtures: LoRA on the stacks in memory, whatever layout the files have."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import eutectic

SIZES: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 2},
}
EXPERTS = 3


def qwen3() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    own = {"moe_intermediate_size": 4, "num_experts": EXPERTS, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **own))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=EXPERTS))


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    own = {"num_local_experts": EXPERTS, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    return GptOssForCausalLM(GptOssConfig(**SIZES, **own))


MODELS = {"qwen3": qwen3, "mixtral": mixtral, "gpt_oss": gpt_oss}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 12)[None]).logits


def load(folder: Path, like: nn.Module) -> Any:
    return type(like).from_pretrained(folder)  # type: ignore[attr-defined]


def served(base: Path, adapter: Path, like: nn.Module) -> nn.Module:
    """Load an adapter with peft, which has nothing to warn of."""
    import peft

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        wrapped = peft.PeftModel.from_pretrained(load(base, like), str(adapter))
    assert [str(w.message) for w in told if "deprecated" not in str(w.message)] == []
    return wrapped


def trained(base: Path, folder: Path, seed: int, like: nn.Module, **options: Any) -> Path:
    """Save an adapter of random values by peft."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(lora_dropout=0.0, **options)
        wrapped: Any = peft.get_peft_model(load(base, like), config)
        torch.manual_seed(seed)
        for name, parameter in sorted(wrapped.named_parameters()):
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn_like(parameter)
        wrapped.save_pretrained(str(folder))
    return folder


@pytest.fixture(params=MODELS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    model = MODELS[request.param]()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    return tmp_path / "base", model


def test_a_fine_tune_of_a_mixture_is_extracted(base: tuple[Path, nn.Module], tmp_path: Path):
    folder, model = base
    generator = torch.Generator().manual_seed(1)
    tuned = load(folder, model)
    for name, parameter in sorted(tuned.named_parameters()):
        if "norm" not in name and "sinks" not in name and parameter.ndim > 1:
            if "proj_bias" not in name:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "adapter"
    report = eutectic.extract(tmp_path / "tuned", base=folder, output=out, rank=24)
    stated = json.loads((out / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in stated["target_parameters"]} == {
        "gate_up_proj",
        "down_proj",
    }
    told = [own["adapter"] for own in report.records.values()]
    assert max(own.get("lost_energy", 0) for own in told) < 1e-9
    wrapped: Any = served(folder, out, model)
    torch.testing.assert_close(answer(wrapped), answer(tuned), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        answer(wrapped.merge_and_unload()), answer(tuned), rtol=1e-4, atol=1e-5
    )
    # Read again, it is the fine-tune.
    eutectic.merge(base=folder, experts={"a": str(out)}, method="linear", output=tmp_path / "again")
    torch.testing.assert_close(
        answer(load(tmp_path / "again", model)), answer(tuned), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("method", ["task_arithmetic", "iso_c"])
def test_merged_adapters_of_stacks_lose_nothing(
    base: tuple[Path, nn.Module], tmp_path: Path, method: str
):
    folder, model = base
    experts = {
        "a": trained(
            folder, tmp_path / "a", 1, model, r=1, target_modules=[], target_parameters=STACKS
        ),
        "b": trained(
            folder,
            tmp_path / "b",
            2,
            model,
            r=2,
            target_modules=["q_proj"],
            target_parameters=STACKS[1:],
        ),
    }
    common: dict[str, Any] = {
        **{"base": folder, "experts": {n: str(p) for n, p in experts.items()}},
        **{"method": method, "scale": 0.8},
    }
    eutectic.merge(**common, output=tmp_path / "model")
    held = eutectic.plan(**common, adapter={}).adapter
    assert held is not None
    assert held["loose"] == []
    report = eutectic.merge(**common, adapter={}, output=tmp_path / "adapter")
    ranks = [own["adapter"]["rank"] for n, own in report.records.items() if "experts" in n]
    assert max(ranks) == 3
    wanted = answer(load(tmp_path / "model", model))
    wrapped = served(folder, tmp_path / "adapter", model)
    torch.testing.assert_close(answer(wrapped), wanted, rtol=1e-4, atol=1e-5)


def test_stacks_are_cut_and_merged_at_a_rank(base: tuple[Path, nn.Module], tmp_path: Path):
    folder, model = base
    options: dict[str, Any] = {"r": 2, "target_modules": [], "target_parameters": STACKS[1:]}
    experts = {
        n: str(trained(folder, tmp_path / n, i, model, **options)) for i, n in enumerate("ab")
    }
    common: dict[str, Any] = {"base": folder, "experts": experts, "method": "task_arithmetic"}
    for place in ("before", "after"):
        out = tmp_path / place
        report = eutectic.merge(**common, adapter={"rank": 2, "compress": place}, output=out)
        told = [r["adapter"] for r in report.records.values() if r["adapter"]["changed"]]
        assert {own["rank"] for own in told} == {2}
        lost = [own["lost_before" if place == "before" else "lost_energy"] for own in told]
        assert all(0 < share < 1 for share in lost)
        stored = load_file(out / "adapter_model.safetensors")
        assert {t.shape[0] for n, t in stored.items() if "lora_A" in n} == {2 * EXPERTS}
        stated = json.loads((out / "adapter_config.json").read_text())
        assert (stated["r"], stated["rank_pattern"]) == (2, {})
        served(folder, out, model)


def test_factors_of_single_experts_become_those_of_stacks(
    base: tuple[Path, nn.Module], tmp_path: Path
):
    """As servers write them; experts without factors stay as they are."""
    from safetensors.torch import save_file

    folder, model = base
    generator = torch.Generator().manual_seed(3)
    inner = {"Qwen3MoeForCausalLM": 4, "MixtralForCausalLM": 24, "GptOssForCausalLM": 24}
    sizes = {"gate_proj": (inner[type(model).__name__], 16), "down_proj": (16, 24)}
    sizes["down_proj"] = (16, sizes["gate_proj"][0])
    factors: dict[str, Tensor] = {}
    for expert, role in ((0, "gate_proj"), (2, "down_proj")):
        key = f"base_model.model.model.layers.1.mlp.experts.{expert}.{role}"
        out, width = sizes[role]
        factors[f"{key}.lora_A.weight"] = torch.randn(2, width, generator=generator)
        factors[f"{key}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    (tmp_path / "a").mkdir()
    save_file(factors, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": list(sizes)}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    common: dict[str, Any] = {
        **{"base": folder, "experts": {"a": str(tmp_path / "a")}},
        **{"method": "task_arithmetic", "scale": 1.0},
    }
    eutectic.merge(**common, output=tmp_path / "model")
    eutectic.merge(**common, adapter={}, output=tmp_path / "adapter")
    wanted = answer(load(tmp_path / "model", model))
    assert not torch.allclose(wanted, answer(load(folder, model)), atol=1e-4)
    wrapped = served(folder, tmp_path / "adapter", model)
    torch.testing.assert_close(answer(wrapped), wanted, rtol=1e-4, atol=1e-5)
