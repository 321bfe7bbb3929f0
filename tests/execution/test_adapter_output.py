"""Guards that adapters written here load in peft, and do what the full merge does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eutectic
from eutectic.errors import NumericalError, RecipeError, RequestError

LLAMA = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40},
    **{"num_attention_heads": 2, "num_key_value_heads": 1},
}


def llama(**more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **more}))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12}
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, **sizes))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "vocab_size": 40, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**sizes, **heads))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=40, decoder_start_token_id=0, pad_token_id=0, **sizes)
    )


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    common = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    common |= {"num_attention_heads": 2}
    vision = {**common, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config={**common, "vocab_size": 40}, vision_config=vision))


def answer(model: nn.Module) -> Tensor:
    """Return a model's outputs for a fixed input."""
    tokens = torch.arange(1, 7)[None]
    more: dict[str, Tensor] = {}
    if "CLIPModel" in str(getattr(model, "config", "")):
        more = {"pixel_values": torch.linspace(-1, 1, 192).view(1, 3, 8, 8)}
    if "T5" in str(getattr(model, "config", "")):
        more = {"decoder_input_ids": torch.tensor([[0, 3, 5]])}
    with torch.no_grad():
        out = model.eval()(input_ids=tokens, **more)
    return out.logits if "logits" in out else torch.cat([out.text_embeds, out.image_embeds])


def moved(model: nn.Module, seed: int, step: float = 0.05) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        parameter.data.add_(step * torch.randn(parameter.shape, generator=generator))
    return model


def loaded(base: Path, adapter: Path, like: nn.Module) -> nn.Module:
    """Load an adapter on the base with peft; no warning that is about either is let pass."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = type(like).from_pretrained(base)  # type: ignore[attr-defined]
        wrapped = PeftModel.from_pretrained(model, str(adapter))
    about = [str(w.message) for w in told if "deprecated" not in str(w.message)]
    if "T5" in type(like).__name__:  # PEFT cannot tie more than an output layer, and warns of it
        about = [text for text in about if "ensure_weight_tying" not in text]
    assert about == []
    return wrapped


def lora(folder: Path, build: Callable[[], nn.Module], seed: int, **options: Any) -> Path:
    """Save an adapter of random values, made by peft."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(build(), peft.LoraConfig(**options))  # type: ignore[arg-type]
        for name, parameter in sorted(wrapped.named_parameters()):
            if "lora_" in name:
                parameter.data = 0.2 * torch.randn_like(parameter)
        wrapped.save_pretrained(str(folder))
    return folder


# --- extract -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Input and output embeddings")
@pytest.mark.parametrize("build", [llama, gpt2, bert, t5, clip])
def test_extracted_at_full_rank_is_the_fine_tune(
    tmp_path: Path, build: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    bare = ("logit_scale", "class_embedding")  # of CLIP, which no module of PEFT's holds
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(bare)}
    tuned = moved(model, 1)
    for name, value in kept.items():
        tuned.get_parameter(name).data.copy_(value)
    tuned.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    out = tmp_path / "adapter"
    report = eutectic.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=out, rank=24, others="save"
    )
    told = {n: r["adapter"] for n, r in report.records.items()}
    assert all(own["lost_energy"] < 1e-9 for own in told.values() if "rank" in own)
    stated = json.loads((out / "eutectic.json").read_text())["adapter"]
    assert stated["left_out"] == []
    wrapped = loaded(tmp_path / "base", out, model)
    wanted = answer(tuned)
    torch.testing.assert_close(answer(wrapped), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answer(wrapped.merge_and_unload()), wanted, rtol=1e-4, atol=1e-5)


def test_extracted_rank_and_energy_lose_what_they_say(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    moved(model, 1).save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    base, tuned = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "tuned"))
    for number, options in enumerate(({"rank": 4}, {"energy": 0.8}, {"rank": 3, "energy": 0.99})):
        out = tmp_path / f"a{number}"
        report = eutectic.extract(
            tmp_path / "tuned", base=tmp_path / "base", output=out, others="drop", **options
        )
        stored = load_file(out / "adapter_model.safetensors")
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["lora_alpha"] == config["r"]
        assert config["alpha_pattern"] == config["rank_pattern"]
        for name in base:
            if "proj" not in name:
                continue
            module = name.removesuffix(".weight")
            a = stored[f"base_model.model.{module}.lora_A.weight"]
            b = stored[f"base_model.model.{module}.lora_B.weight"]
            change = (tuned[name] - base[name]).double()
            values = torch.linalg.svdvals(change) ** 2
            kept = float(values[: len(a)].sum() / values.sum())
            told = report.records[name]["adapter"]
            error = torch.linalg.vector_norm(change - b.double() @ a.double()) ** 2 / values.sum()
            assert told["lost_energy"] == pytest.approx(float(error), abs=1e-6)
            assert float(error) == pytest.approx(1 - kept, abs=1e-5)
            assert config["rank_pattern"].get(module, config["r"]) == len(a)
            if "rank" in options:
                assert len(a) == options["rank"]
            else:
                assert kept >= 0.8
                assert float(values[: len(a) - 1].sum() / values.sum()) < 0.8
        assert not any("norm" in key for key in stored)


def test_rows_that_were_added_and_tied_tables_go_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model.resize_token_embeddings(44)  # type: ignore[operator]
    tuned = moved(model, 1)
    tuned.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    (tmp_path / "tuned" / "tokenizer.json").write_text("{}")
    out = tmp_path / "adapter"
    eutectic.extract(tmp_path / "tuned", base=tmp_path / "base", output=out, rank=24, others="save")
    assert (out / "tokenizer.json").exists()
    grown = type(model).from_pretrained(tmp_path / "base")  # type: ignore[attr-defined]
    grown.resize_token_embeddings(44)
    grown.save_pretrained(tmp_path / "grown")
    wrapped = loaded(tmp_path / "grown", out, model)
    torch.testing.assert_close(answer(wrapped), answer(tuned), rtol=1e-4, atol=1e-5)


def test_tables_as_thin_factors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    tuned = moved(model, 1)
    tuned.save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    out = tmp_path / "adapter"
    options: dict[str, Any] = {"others": "save", "tables": "low_rank"}
    eutectic.extract(tmp_path / "tuned", base=tmp_path / "base", output=out, rank=24, **options)
    config = json.loads((out / "adapter_config.json").read_text())
    assert {"model.embed_tokens", "lm_head"} <= set(config["target_modules"])
    wrapped = loaded(tmp_path / "base", out, model)
    torch.testing.assert_close(answer(wrapped), answer(tuned), rtol=1e-4, atol=1e-5)


def test_the_bias_of_an_output_layer_goes_along_with_its_tied_table(tmp_path: Path) -> None:
    """A masked model's decoder is the table and a bias, which its file has under another name."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=40, num_attention_heads=2, **sizes))
    model.cls.predictions.bias.data.copy_(torch.linspace(-1, 1, 40))
    model.save_pretrained(tmp_path / "base")
    tuned = BertForMaskedLM.from_pretrained(tmp_path / "base")
    tuned.bert.embeddings.word_embeddings.weight.data[3:9] += 0.5
    tuned.save_pretrained(tmp_path / "tuned")
    eutectic.extract(tmp_path / "tuned", base=tmp_path / "base", rank=2, output=tmp_path / "out")
    wrapped = loaded(tmp_path / "base", tmp_path / "out", tuned)
    torch.testing.assert_close(answer(wrapped), answer(tuned), rtol=1e-5, atol=1e-5)


def test_norms_that_change_are_refused_or_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    moved(model, 1).save_pretrained(tmp_path / "tuned")  # type: ignore[operator]
    out = tmp_path / "adapter"
    with pytest.raises(RecipeError, match="5 norms and biases change.*others: drop"):
        eutectic.extract(tmp_path / "tuned", base=tmp_path / "base", output=out, rank=4)
    assert not out.exists()
    report = eutectic.extract(
        tmp_path / "tuned", base=tmp_path / "base", output=out, rank=4, others="drop"
    )
    assert report.resumed
    left = json.loads((out / "eutectic.json").read_text())["adapter"]["left_out"]
    assert len(left) == 5
    assert all("norm" in name for name in left)
    assert any("does not hold the change" in note for note in report.notes)


# --- merges ------------------------------------------------------------------------------------


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, str]:
    """Two adapters of unequal rank and targets on one base."""
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")  # type: ignore[operator]

    def base() -> nn.Module:
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(tmp_path / "base")

    first = {"target_modules": ["q_proj", "v_proj", "up_proj"], "r": 2, "lora_alpha": 6}
    second = {"target_modules": ["q_proj", "down_proj"], "r": 3, "use_rslora": True}
    return {
        "a": str(lora(tmp_path / "a", base, 1, **first)),
        "b": str(lora(tmp_path / "b", base, 2, **second)),
    }


@pytest.mark.parametrize(
    "method",
    ["task_arithmetic", "average", "linear", "iso_c", "tsv_m", "core_ties", "knots_ties"],
)
def test_lossless_from_factors(tmp_path: Path, experts: dict[str, str], method: str) -> None:
    """At the rank of the stacked factors the adapter does what the full merge does."""
    base = str(tmp_path / "base")
    common: dict[str, Any] = {"base": base, "experts": experts, "method": method, "scale": 0.7}
    eutectic.merge(**common, output=tmp_path / "model")
    report = eutectic.merge(**common, adapter=True, output=tmp_path / "adapter")
    ranks = {name.split(".")[-2]: own["adapter"]["rank"] for name, own in report.records.items()}
    assert ranks == {"q_proj": 5, "v_proj": 2, "up_proj": 2, "down_proj": 3}
    from transformers import LlamaForCausalLM

    full = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    wrapped = loaded(tmp_path / "base", tmp_path / "adapter", full)
    torch.testing.assert_close(answer(wrapped), answer(full), rtol=1e-5, atol=1e-5)
    assert report.norms["ratio"] is not None


def test_weights_of_experts_count(tmp_path: Path, experts: dict[str, str]) -> None:
    specs = {
        n: {"path": p, "weight": w} for (n, p), w in zip(experts.items(), (0.25, -2), strict=True)
    }
    base = str(tmp_path / "base")
    eutectic.merge(
        base=base,
        experts=specs,
        method="task_arithmetic",
        scale=1,
        adapter={},
        output=tmp_path / "o",
    )
    stored = load_file(tmp_path / "o" / "adapter_model.safetensors")
    own = {n: load_file(Path(p) / "adapter_model.safetensors") for n, p in experts.items()}
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight".format
    wanted = 0.25 * 3 * own["a"][key("B")] @ own["a"][key("A")]
    wanted += -2 * (8 / 3**0.5) * own["b"][key("B")] @ own["b"][key("A")]
    torch.testing.assert_close(stored[key("B")] @ stored[key("A")], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("treatment", ["vector", "conv"])
@pytest.mark.parametrize("adapter", [{}, {"rank": 16}, {"rank": 16, "compress": "before"}])
def test_conv1d_layers_that_a_rule_merges_otherwise(
    tmp_path: Path, treatment: str, adapter: dict[str, Any]
) -> None:
    """Their factors are those of the linear map, which the file keeps `[in, out]`, all the same."""
    from transformers import GPT2LMHeadModel

    moved(gpt2(), 0).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    own = {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}
    experts = {n: str(lora(tmp_path / n, gpt2, i, r=2, **own)) for i, n in enumerate("ab")}
    rules = [{"match": "*.attn.c_*.weight", "treatment": treatment}]
    common: dict[str, Any] = {"base": str(tmp_path / "base"), "experts": experts}
    common |= {"method": "task_arithmetic", "tensors": rules}
    eutectic.merge(**common, output=tmp_path / "model")
    eutectic.merge(**common, adapter=adapter, output=tmp_path / "adapter")
    full = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    wrapped = loaded(tmp_path / "base", tmp_path / "adapter", full)
    torch.testing.assert_close(answer(wrapped), answer(full), rtol=1e-5, atol=1e-5)


def test_an_adapter_of_conv1d_layers_that_changes_nothing(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    base = str(tmp_path / "base")
    common = {"base": base, "method": "task_arithmetic", "scale": 0, "adapter": {"rank": 2}}
    eutectic.merge(**common, experts={"a": base}, output=tmp_path / "out")
    like = gpt2()
    wrapped = loaded(tmp_path / "base", tmp_path / "out", like)
    same = type(like).from_pretrained(base)  # type: ignore[attr-defined]
    assert torch.equal(answer(wrapped), answer(same))


def test_lossless_is_refused_where_it_would_lose(
    tmp_path: Path, experts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(tmp_path / "base")
    wanted: dict[str, Any] = {"base": base, "experts": experts, "adapter": {}}
    for method in ("ties", "dare_linear", "slerp"):  # told before any work
        own = wanted | {"method": method, "experts": {n: experts[n] for n in "ab"}}
        for refuse in (eutectic.plan, lambda **o: eutectic.merge(**o, output=tmp_path / "ties")):
            with pytest.raises(RecipeError, match="more directions than their factors") as told:
                refuse(**own)
            assert [fault.kind for fault in told.value.faults] == ["rank_needed"]
    assert not (tmp_path / "ties").exists()
    monkeypatch.setattr("eutectic.planning.adapter_plan._beyond", lambda *_: [])
    with pytest.raises(NumericalError, match="more than 3 directions"):  # what no plan knows
        eutectic.merge(**wanted, method="ties", output=tmp_path / "ties")
    model = moved(llama(), 3)
    model.save_pretrained(tmp_path / "full")  # type: ignore[operator]
    both = {"a": experts["a"], "full": str(tmp_path / "full")}
    with pytest.raises(RecipeError, match="'full': its change has no thin factors"):
        eutectic.merge(base=base, experts=both, method="ties", adapter={}, output=tmp_path / "c")
    report = eutectic.merge(
        base=base, experts=experts, method="ties", adapter={"rank": 4}, output=tmp_path / "cut"
    )
    lost = [own["adapter"]["lost_energy"] for own in report.records.values()]
    assert 0 < max(lost) < 0.5


def test_alpha_that_is_searched_and_layers_that_are_compared(
    tmp_path: Path, experts: dict[str, str]
) -> None:
    """What is merged before α is known ends in the same adapter."""
    base = str(tmp_path / "base")
    common: dict[str, Any] = {"base": base, "experts": experts, "method": "task_arithmetic"}

    def choose(plan: Any, inputs: Any) -> Any:
        from eutectic.errors import Note
        from eutectic.execution.schedule import Choice

        return lambda unscaled: Choice(0.6, Note("earlier_scale", (), {"scale": 0.6}), {})

    (tmp_path / "t.yaml").write_text("tasks: {}")
    eutectic.merge(
        **common,
        scale={"search": "divergence", "tasks": str(tmp_path / "t.yaml")},
        adapter={"rank": 5},
        choose=choose,
        output=tmp_path / "late",
    )
    eutectic.merge(**common, scale=0.6, adapter={"rank": 5}, output=tmp_path / "known")
    late, known = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("late", "known"))
    for key in known:
        if "lora_A" in key:
            b = key.replace("lora_A", "lora_B")
            torch.testing.assert_close(
                late[b] @ late[key], known[b] @ known[key], rtol=1e-4, atol=1e-5
            )


def test_a_killed_run_goes_on_with_the_same_bytes(
    tmp_path: Path, experts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from eutectic.execution import tasks

    common: dict[str, Any] = {
        **{"base": str(tmp_path / "base"), "experts": experts, "method": "iso_c"},
        **{"adapter": {"rank": 3}, "threads": 1},
    }
    eutectic.merge(**common, output=tmp_path / "whole")
    real, calls = tasks.write_part, []

    def failing(*args: Any) -> Any:
        calls.append(args[0].name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(tasks, "write_part", failing)
    with pytest.raises(KeyboardInterrupt):
        eutectic.merge(**common, output=tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(tasks, "write_part", lambda *args: calls.append("again") or real(*args))
    report = eutectic.merge(**common, output=tmp_path / "killed")
    assert report.resumed
    assert calls.count("again") == 8 - 3
    for name in ("adapter_model.safetensors", "adapter_config.json", "eutectic.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "killed.partial").exists()


def test_heads_of_one_expert_go_along_and_those_of_two_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    options = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "r": 2}

    def build() -> nn.Module:
        return type(model).from_pretrained(tmp_path / "base")  # type: ignore[attr-defined]

    paths = {n: str(lora(tmp_path / n, build, i, **options)) for i, n in enumerate("ab")}
    for name in paths:
        file = tmp_path / name / "adapter_model.safetensors"
        stored = load_file(file)
        stored["base_model.model.classifier.weight"] += ord(name)
        save_file(stored, file)
    common: dict[str, Any] = {"base": str(tmp_path / "base"), "method": "average", "adapter": {}}
    rules = [{"match": "classifier.*", "treatment": "head"}]
    with pytest.raises(RecipeError, match="an adapter has one head"):
        eutectic.merge(**common, experts=paths, tensors=rules, output=tmp_path / "two")
    eutectic.merge(**common, experts={"a": paths["a"]}, tensors=rules, output=tmp_path / "one")
    wrapped = loaded(tmp_path / "base", tmp_path / "one", model)
    wanted = loaded(tmp_path / "base", tmp_path / "a", model)
    torch.testing.assert_close(answer(wrapped), answer(wanted), rtol=1e-5, atol=1e-5)


def test_a_plan_says_what_the_adapter_will_hold(tmp_path: Path, experts: dict[str, str]) -> None:
    from eutectic.planning.adapter_outlook import outlook_in_words

    common: dict[str, Any] = {"base": str(tmp_path / "base"), "method": "average"}
    held = eutectic.plan(**common, experts=experts, adapter={}).adapter
    assert held is not None
    assert (held["layers"], held["ranks"]) == (8, {"2": 4, "3": 2, "5": 2})
    assert (held["modules_to_save"], held["not_held"], held["certain"]) == ([], [], True)
    assert outlook_in_words(held) == ["thin factors of 8 layers of ranks 2 to 5"]
    report = eutectic.merge(**common, experts=experts, adapter={}, output=tmp_path / "out")
    found = [own["adapter"]["rank"] for own in report.records.values()]
    assert {str(rank): found.count(rank) for rank in set(found)} == held["ranks"]
    moved(llama(), 3).save_pretrained(tmp_path / "full")  # type: ignore[operator]
    both = {"a": experts["a"], "full": str(tmp_path / "full")}
    made = eutectic.plan(**common, experts=both, adapter={"rank": 20, "compress": "before"})
    held = made.adapter
    assert held is not None
    assert held["ranks"] == {"8": 4, "16": 10}
    assert held["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    said = outlook_in_words(held)
    assert said[0].endswith("ranks 8 to 16, to which the experts are brought before")
    assert "5 norms and biases" in said[2]
    assert "refused (others: drop" in said[2]
    assert said[2].endswith("if they change")
    assert "thin factors of 14 layers" in repr(made)
    held = eutectic.plan(**common, experts=both, adapter={"rank": "auto", "others": "drop"}).adapter
    assert held is not None
    assert held["ranks"] == {"energy": 14}
    said = outlook_in_words(held)
    assert said[0] == "thin factors of 14 layers of the ranks that keep 0.99 of each change"
    assert "which are left as in the base (others: drop) if they change" in said[2]
    assert eutectic.plan(**common, experts=experts).adapter is None


@pytest.mark.filterwarnings("ignore")
def test_a_plan_says_which_projections_are_drawn_again(tmp_path: Path) -> None:
    import peft

    llama().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    for stored in (True, False):
        config = peft.VeraConfig(
            target_modules=["q_proj"], r=4, save_projection=stored, projection_prng_key=7
        )
        folder = tmp_path / str(stored)
        peft.get_peft_model(llama(), config).save_pretrained(str(folder))  # type: ignore[arg-type]
        made = eutectic.plan(
            base=str(tmp_path / "base"), experts={"v": str(folder)}, method="average"
        )
        told = [n for n in made.note_records if n.kind == "projections_drawn"]
        assert [n.numbers["seed"] for n in told] == ([] if stored else [7])


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"adapter": {"rank": 0}}, "rank"),
        ({"adapter": {"rank": "all"}}, "rank"),
        ({"adapter": {"energy": 1.5}}, "energy"),
        ({"adapter": {"size": 3}}, "size"),
        ({"adapter": {"rank": 3}, "output": "x"}, "x"),
        ({"output": "model", "adapter": {"rank": 3}}, "output: model asks for none"),
    ],
)
def test_what_is_no_adapter(
    tmp_path: Path, experts: dict[str, str], stated: dict[str, Any], message: str
) -> None:
    recipe = {"base": str(tmp_path / "base"), "experts": experts, "method": "average", **stated}
    with pytest.raises(RequestError, match=message):
        eutectic.merge(recipe, output=tmp_path / "out")


@pytest.mark.parametrize(
    "adapter", [{}, {"rank": 2}, {"rank": 3, "compress": "before"}, {"tables": "low_rank"}]
)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_plan_knows_the_bytes_of_adapters(
    tmp_path: Path, experts: dict[str, str], adapter: dict[str, Any], dtype: str | None
) -> None:
    common: dict[str, Any] = {"base": str(tmp_path / "base"), "experts": experts, "dtype": dtype}
    common |= {"method": "task_arithmetic", "adapter": adapter}
    made = eutectic.plan(**common)
    eutectic.merge(**common, output=tmp_path / "out")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    written = sum(t.numel() * t.element_size() for t in stored.values())
    assert made.cost["write_bytes"] == written
    assert sum(row["write_bytes"] for row in made.tensors) == written


def test_a_plan_bounds_the_bytes_of_what_it_cannot_know(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    moved(model, 3).save_pretrained(tmp_path / "full")  # type: ignore[operator]
    common: dict[str, Any] = {
        "base": str(tmp_path / "base"), "experts": {"full": str(tmp_path / "full")},
        "method": "task_arithmetic",
    }  # fmt: skip
    for adapter in ({"rank": "auto", "others": "save"}, {"rank": 4, "others": "drop"}):
        made = eutectic.plan(**common, adapter=adapter)
        out = tmp_path / str(adapter["rank"])
        eutectic.merge(**common, adapter=adapter, output=out)
        stored = load_file(out / "adapter_model.safetensors")
        written = sum(t.numel() * t.element_size() for t in stored.values())
        assert written <= made.cost["write_bytes"] <= 2.5 * written


@pytest.mark.parametrize("method", ["task_arithmetic", "iso_c"])
def test_small_factors_fit_into_half_precision(tmp_path: Path, method: str) -> None:
    """A B of 1e-8 has none of its bits in float16, beside an A of 1."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "none"}')
    name = "model.layers.0.self_attn.q_proj"
    save_file({f"{name}.weight": torch.zeros(24, 20)}, tmp_path / "base" / "model.safetensors")
    torch.manual_seed(2)
    A, B = torch.randn(3, 20), torch.randn(24, 3) * torch.tensor([1e-8, 1e-7, 1e-6])
    (tmp_path / "a").mkdir()
    key = f"base_model.model.{name}"
    held = {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
    save_file(held, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["q_proj"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    products: list[Tensor] = []
    for dtype in ("float32", "float16"):
        eutectic.merge(
            base=tmp_path / "base", experts={"a": str(tmp_path / "a")}, method=method, scale=1.0,
            adapter={}, dtype=dtype, output=tmp_path / dtype,
        )  # fmt: skip
        own = load_file(tmp_path / dtype / "adapter_model.safetensors")
        assert {str(t.dtype) for t in own.values()} == {f"torch.{dtype}"}
        left, right = own[f"{key}.lora_B.weight"].double(), own[f"{key}.lora_A.weight"].double()
        products.append(left @ right)
    assert (products[1] - products[0]).norm() < 1e-3 * products[0].norm()
