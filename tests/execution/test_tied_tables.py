"""Tied tables against transformers and peft: every name of a group, heads that untie.

References are models in memory whose parameters are averaged by hand, and peft's own outputs.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eutectic
from eutectic.errors import RecipeError

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

IDS = torch.arange(3, 15).view(2, 6)
SMALL = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 24, "max_position_embeddings": 32}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "tie_word_embeddings": True},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24}
        | {"decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"max_position_embeddings": 32},
    ),
    "marian": (
        "MarianMTModel",
        "MarianConfig",
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24}
        | {"decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"max_position_embeddings": 32, "decoder_start_token_id": 0},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24}
        | {"decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"max_source_positions": 6, "max_target_positions": 32, "num_mel_bins": 8}
        | {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "tie_word_embeddings": True,
            "text_config": {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
            | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
            | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
            "vision_config": {"depth": 1, "hidden_size": 16, "intermediate_size": 24}
            | {"num_heads": 2, "out_hidden_size": 16},
        },
    ),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT),
}
# Tensors that a tied model has under several names, the first of which `save_pretrained` keeps.
GROUPS: dict[str, list[list[str]]] = {
    "llama": [["model.embed_tokens.weight", "lm_head.weight"]],
    "gpt2": [["transformer.wte.weight", "lm_head.weight"]],
    "t5": [
        ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
        + ["lm_head.weight"]
    ],
    "bart": [
        ["model.shared.weight", "model.encoder.embed_tokens.weight"]
        + ["model.decoder.embed_tokens.weight", "lm_head.weight"]
    ],
    "marian": [
        ["model.shared.weight", "model.encoder.embed_tokens.weight"]
        + ["model.decoder.embed_tokens.weight", "lm_head.weight"]
    ],
    "whisper": [["model.decoder.embed_tokens.weight", "proj_out.weight"]],
    "qwen2_5_vl": [["model.language_model.embed_tokens.weight", "lm_head.weight"]],
    "bert": [
        ["bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"],
        ["cls.predictions.bias", "cls.predictions.decoder.bias"],
    ],
    "roberta": [
        ["roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"],
        ["lm_head.bias", "lm_head.decoder.bias"],
    ],
}
Tensors = dict[str, Tensor]


def build(kind: str, seed: int = 0) -> Any:
    name, config, options = KINDS[kind]
    torch.manual_seed(seed)
    return getattr(transformers, name)(getattr(transformers, config)(**SMALL, **options)).eval()


def moved(model: Any, seed: int) -> Any:
    """Return the model with noise on every parameter that is saved; tied ones stay one."""
    generator = torch.Generator().manual_seed(seed)
    computed = model._keys_to_ignore_on_save or ()  # sinusoidal positions
    for name, parameter in model.named_parameters():
        if name not in computed:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def untied(model: Any, seed: int) -> Any:
    """Return the model with an output layer of its own."""
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    noise = 0.05 * torch.randn(head.weight.shape, generator=generator)
    head.weight = torch.nn.Parameter(head.weight.detach() + noise)
    return model


def logits(model: Any) -> Tensor:
    given = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = IDS
    if model.config.model_type == "whisper":
        sound = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0))
        given = {"input_features": sound, "decoder_input_ids": IDS}
    with torch.no_grad():
        return model(**given).logits


def averaged(models: list[Any]) -> Any:
    """Return the first model with the mean of all parameters, buffers as they are."""
    states = [{n: w.clone() for n, w in model.state_dict().items()} for model in models]
    result = models[0]
    for name, own in result.state_dict().items():
        if own.is_floating_point():
            own.copy_(torch.stack([s[name] for s in states]).double().mean(0))
    return result


def save(model: Any, folder: Path, names: Mapping[str, str] | None = None) -> Path:
    """Save a model; tied tensors under all their names, or under those of `names` alone."""
    model.save_pretrained(folder)
    if names is None:
        return folder
    held = load_file(folder / "model.safetensors")
    state = model.state_dict()
    held |= {name: state[name].clone() for name in names}
    kept = {k: v for k, v in held.items() if names.get(k) != "drop"}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def loaded(folder: Path) -> Any:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, architecture).from_pretrained(
        folder, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def merge(folder: Path, *names: str, **options: Any) -> Path:
    experts = {name: str(folder / name) for name in names}
    request = {"method": "average", "base": str(folder / "base"), "experts": experts} | options
    return eutectic.merge(**request, output=folder / "out").output


def forms(kind: str, chosen: random.Random) -> dict[str, str]:
    """Return names to write and to drop, so that some of every group are left."""
    names: dict[str, str] = {}
    for group in GROUPS[kind]:
        kept = chosen.sample(group, chosen.randint(1, len(group)))
        names |= {name: "keep" if name in kept else "drop" for name in group}
    return names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("written", ["as saved", "all", "last", "mixed"])
def test_a_tied_model_merges_under_whichever_names(kind: str, written: str, tmp_path: Path):
    every = {n: "keep" for group in GROUPS[kind] for n in group}
    last = {n: "keep" if n == group[-1] else "drop" for group in GROUPS[kind] for n in group}
    of_base = {"as saved": None, "all": every, "last": last, "mixed": every}[written]
    of_a = {"as saved": None, "all": every, "last": last, "mixed": last}[written]
    of_b = {"as saved": None, "all": every, "last": last, "mixed": None}[written]
    save(build(kind), tmp_path / "base", of_base)
    save(moved(build(kind), 1), tmp_path / "a", of_a)
    save(moved(build(kind), 2), tmp_path / "b", of_b)
    result = loaded(merge(tmp_path, "a", "b"))
    reference = averaged([moved(build(kind), 1), moved(build(kind), 2)])
    torch.testing.assert_close(logits(result), logits(reference), rtol=1e-5, atol=1e-6)
    for group in GROUPS[kind]:
        state = result.state_dict()
        assert all(torch.equal(state[n], state[group[0]]) for n in group)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (tmp_path / "base/config.json").read_text()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["average", "dare_linear", "iso_c"])
def test_the_merge_does_not_depend_on_which_names_a_file_holds(
    kind: str, method: str, tmp_path: Path
):
    chosen = random.Random(f"{kind} {method}")
    save(build(kind), tmp_path / "base", {n: "keep" for g in GROUPS[kind] for n in g})
    wanted: Tensors | None = None
    for turn in range(4):
        for seed, name in enumerate("ab", 1):
            names = forms(kind, chosen) if turn else None
            save(moved(build(kind), seed), tmp_path / f"{turn}" / name, names)
        experts = {name: str(tmp_path / f"{turn}" / name) for name in "ab"}
        out = eutectic.merge(
            base=str(tmp_path / "base"), experts=experts, method=method,
            output=tmp_path / f"out{turn}",
        ).output  # fmt: skip
        found = load_file(out / "model.safetensors")
        wanted = wanted or found
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)
        assert not (out / "experts").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names_of_base", ["as saved", "all"])
def test_a_head_trained_apart_unties(kind: str, names_of_base: str, tmp_path: Path):
    every = {n: "keep" for group in GROUPS[kind] for n in group}
    save(build(kind), tmp_path / "base", every if names_of_base == "all" else None)
    save(moved(build(kind), 1), tmp_path / "a")
    save(untied(moved(build(kind), 2), 3), tmp_path / "b")
    out = merge(tmp_path, "a", "b")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    first = untied(moved(build(kind), 1), 3)
    head = first.get_output_embeddings()
    head.weight.data.copy_(first.get_input_embeddings().weight)
    reference = averaged([first, untied(moved(build(kind), 2), 3)])
    torch.testing.assert_close(logits(loaded(out)), logits(reference), rtol=1e-5, atol=1e-6)
    notes = json.loads((out / "eutectic.json").read_text())["notes"]
    assert any("no longer tied to" in note and "'b'" in note for note in notes)
    assert any("scale_decoder_outputs" in note for note in notes) is (kind == "t5")


def adapted(kind: str, seed: int, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(kind), LoraConfig(r=2, lora_alpha=4, **options))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, lm_head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "llama, both": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "llama, saved head": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "llama, saved table": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "llama, saved both": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "gpt2, lm_head": ("gpt2", {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True}),
    "gpt2, saved both": (
        "gpt2",
        {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]},
    ),
    "whisper, proj_out": ("whisper", {"target_modules": ["q_proj", "proj_out"]}),
    "whisper, saved table": (
        "whisper",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "qwen2_5_vl, lm_head": ("qwen2_5_vl", {"target_modules": ["q_proj", "lm_head"]}),
    "bart, lm_head": ("bart", {"target_modules": ["q_proj", "lm_head"]}),
    "t5, lm_head": ("t5", {"target_modules": ["q", "lm_head"]}),
    "bert, decoder": ("bert", {"target_modules": ["query", "decoder"]}),
    "roberta, decoder": ("roberta", {"target_modules": ["query", "decoder"]}),
}


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("written", ["as saved", "all"])
def test_an_adapter_on_a_tied_base(case: str, written: str, tmp_path: Path):
    kind, options = ADAPTERS[case]
    every = {n: "keep" for group in GROUPS[kind] for n in group}
    save(build(kind), tmp_path / "base", every if written == "all" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about tied tables
        model = adapted(kind, 1, **options)
        model.save_pretrained(tmp_path / "a")
        wanted = logits(model)
        # Of layers that are saved whole peft merges the same; of others it changes the tied table.
        if "saved" in case:
            whole = logits(model.merge_and_unload())
            torch.testing.assert_close(whole, wanted, rtol=1e-5, atol=1e-6)
    out = merge(tmp_path, "a")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(loaded(out)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bart", "t5"])
def test_lora_on_the_table_alone_changes_the_one_table(kind: str, tmp_path: Path):
    """What the merged weight is, in peft too; only beside the base the head stays as it is."""
    save(build(kind), tmp_path / "base")
    targets = {"llama": ["embed_tokens"], "bart": ["shared"], "t5": ["shared"]}[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about tied tables
        model = adapted(kind, 1, target_modules=targets)
        model.save_pretrained(tmp_path / "a")
        wanted = logits(model.merge_and_unload())
    out = merge(tmp_path, "a")
    assert (
        load_file(out / "model.safetensors").keys()
        == load_file(tmp_path / "base/model.safetensors").keys()
    )
    torch.testing.assert_close(logits(loaded(out)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"target_modules": ["embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
])  # fmt: skip
def test_an_adapter_that_peft_keeps_tied(options: dict[str, Any], tmp_path: Path):
    save(build("llama"), tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about tied tables
        model = adapted("llama", 1, ensure_weight_tying=True, **options)
        model.save_pretrained(tmp_path / "a")
        wanted = logits(model)
    out = merge(tmp_path, "a")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    torch.testing.assert_close(logits(loaded(out)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "table"), [("llama", "embed_tokens"), ("t5", "shared")])
def test_trained_tokens_that_are_saved_under_every_name(kind: str, table: str, tmp_path: Path):
    """PEFT writes the rows once for each of the tied layers; other rows of a head untie it."""
    from peft import TrainableTokensConfig, get_peft_model

    save(build(kind), tmp_path / "base")
    config = TrainableTokensConfig(token_indices=[7, 2], target_modules=[table])
    rows = torch.randn(2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about tied tables
        model = get_peft_model(build(kind), config).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(rows)
        model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a/adapter_model.safetensors"
    held = load_file(file)
    assert len(held) == {"llama": 2, "t5": 4}[kind]
    out = merge(tmp_path, "a")
    found, base = (load_file(p / "model.safetensors") for p in (out, tmp_path / "base"))
    assert found.keys() == base.keys()
    torch.testing.assert_close(logits(loaded(out)), logits(model), rtol=1e-4, atol=1e-5)
    held["base_model.model.lm_head.trainable_tokens_delta"] += 1
    save_file(held, file)
    shutil.rmtree(out)
    head = load_file(merge(tmp_path, "a") / "model.safetensors")["lm_head.weight"]
    wanted = next(v for n, v in base.items() if "shared" in n or "embed_tokens" in n).clone()
    wanted[[7, 2]] = rows + 1
    torch.testing.assert_close(head, wanted)


def test_the_saved_head_of_an_adapter_keeps_the_one_name_of_its_bias(tmp_path: Path):
    """Heads of CTC models have a bias, and no second name for it as those of masked ones."""
    kind = transformers.PhiForCausalLM, transformers.PhiConfig(**SMALL, intermediate_size=12)
    for name, base in (("phi", kind[0](kind[1])), ("roberta", build("roberta"))):
        folder = tmp_path / name
        save(base, folder / "base")
        bias = torch.randn(base.config.vocab_size)
        (folder / "a").mkdir()
        adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
        adapter["modules_to_save"] = ["lm_head"]
        (folder / "a/adapter_config.json").write_text(json.dumps(adapter))
        save_file({"base_model.model.lm_head.bias": bias}, folder / "a/adapter_model.safetensors")
        found = load_file(merge(folder, "a") / "model.safetensors")
        assert torch.equal(found["lm_head.bias"], bias)
        assert found.keys() == load_file(folder / "base/model.safetensors").keys()


def test_a_head_adapter_beside_others(tmp_path: Path):
    """One expert trains the head, one all of a tied model, one nothing of either."""
    save(build("llama"), tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft, about tied tables
        adapted("llama", 1, target_modules=["lm_head"]).save_pretrained(tmp_path / "a")
        adapted("llama", 2, target_modules=["q_proj"]).save_pretrained(tmp_path / "c")
    save(moved(build("llama"), 3), tmp_path / "b")
    found = load_file(merge(tmp_path, "a", "b", "c") / "model.safetensors")
    base, b = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "b"))
    table, own = base["model.embed_tokens.weight"], b["model.embed_tokens.weight"]
    a = load_file(tmp_path / "a/adapter_model.safetensors")
    factors = (a[f"base_model.model.lm_head.lora_{side}.weight"] for side in "BA")
    left, right = factors
    wanted = (table + 2 * left @ right + own + table) / 3
    torch.testing.assert_close(found["lm_head.weight"], wanted, rtol=1e-5, atol=1e-6)
    wanted = (2 * table + own) / 3
    torch.testing.assert_close(found["model.embed_tokens.weight"], wanted, rtol=1e-5, atol=1e-6)


def test_an_untied_base_and_a_tied_expert(tmp_path: Path):
    save(untied(build("gpt2"), 7), tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config["tie_word_embeddings"] = False
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    save(moved(build("gpt2"), 1), tmp_path / "a")
    out = merge(tmp_path, "a")
    reference = logits(moved(build("gpt2"), 1))
    torch.testing.assert_close(logits(loaded(out)), reference, rtol=1e-5, atol=1e-6)


def test_copies_that_differ_are_not_chosen_from(tmp_path: Path):
    save(build("t5"), tmp_path / "base", {n: "keep" for n in GROUPS["t5"][0]})
    save(moved(build("t5"), 1), tmp_path / "a", {n: "keep" for n in GROUPS["t5"][0]})
    held = load_file(tmp_path / "a/model.safetensors")
    del held["shared.weight"]
    held["decoder.embed_tokens.weight"] += 1
    save_file(held, tmp_path / "a/model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"shared.weight: expert 'a' lacks it, and holds"):
        merge(tmp_path, "a")


def test_a_base_whose_file_contradicts_its_configuration(tmp_path: Path):
    save(untied(build("llama"), 7), tmp_path / "base")
    assert json.loads((tmp_path / "base/config.json").read_text())["tie_word_embeddings"]
    save(untied(moved(build("llama"), 1), 2), tmp_path / "a")
    out = merge(tmp_path, "a")
    reference = logits(untied(moved(build("llama"), 1), 2))
    torch.testing.assert_close(logits(loaded(out)), reference, rtol=1e-5, atol=1e-6)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    notes = json.loads((out / "eutectic.json").read_text())["notes"]
    assert any("ties 'lm_head.weight' to 'model.embed_tokens.weight'" in note for note in notes)


def test_heads_that_a_detector_shares_between_layers(tmp_path: Path):
    def detector(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        head = {"layers.0.weight": torch.randn(4, 8, generator=generator)}
        head |= {"layers.0.bias": torch.full((4,), float(seed)), "norm.weight": torch.ones(4)}
        tensors = {f"bbox_embed.{i}.{n}": w.clone() for i in range(3) for n, w in head.items()}
        return tensors | {"body.weight": torch.randn(8, 8, generator=generator)}

    def put(name: str, tensors: Tensors) -> None:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})

    def first(tensors: Tensors) -> Tensors:
        return {
            n: w for n, w in tensors.items() if not n.startswith(("bbox_embed.1", "bbox_embed.2"))
        }

    put("base", detector(0))
    put("a", first(detector(1)))
    put("b", detector(2))
    found = load_file(merge(tmp_path, "a", "b") / "model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (detector(1)[name] + detector(2)[name]) / 2)
    # The base holds one, an expert all.
    save_file(first(detector(0)), tmp_path / "base/model.safetensors", {"format": "pt"})
    out = eutectic.merge(
        base=str(tmp_path / "base"), experts={n: str(tmp_path / n) for n in "ab"},
        method="average", output=tmp_path / "one",
    ).output  # fmt: skip
    assert load_file(out / "model.safetensors").keys() == first(detector(0)).keys()
    assert not (out / "experts").exists()
