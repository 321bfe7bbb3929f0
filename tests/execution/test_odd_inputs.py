"""Checkpoints and requests that people have: what is taken along, what is refused before work.

Guards: a lone file as an expert or base; donors of side files without a configuration; copies of
tied tables; stated dtypes; counters of batch norms; rules, splits, weights and names that cannot be
followed are told or refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import eutectic
from eutectic.checkpoint.folder import side_files
from eutectic.errors import EutecticError, MethodError, RecipeError
from helpers.cli import invoke
from helpers.folders import load, make_base, make_expert, save

WIDTH = 16


@pytest.fixture
def family(tmp_path: Path) -> Path:
    base = make_base()
    save(tmp_path / "base", base, {"model_type": "toy", "dtype": "float32"})
    for i, name in enumerate("ab"):
        expert = make_expert(base, i)
        expert["classifier.weight"] = torch.ones(i + 2, WIDTH)
        save(tmp_path / name, expert, {"model_type": "toy", "dtype": "bfloat16", "own": name})
    return tmp_path


def merged(folder: Path, **options: Any) -> Path:
    given = {"a": str(folder / "a"), "b": str(folder / "b")}
    request = {"base": str(folder / "base"), "experts": given, "method": "average"} | options
    return eutectic.merge(**request, output=folder / "out").output


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("donor", ["base", "a"])
def test_a_lone_file_may_have_heads_and_lend_its_side_files(family: Path, donor: str):
    experts = {n: str(family / n / "model.safetensors") for n in "ab"}
    found = merged(family, experts=experts, side_files=donor)
    assert load(found / "experts" / "a")["classifier.weight"].shape == (2, WIDTH)
    assert config(found).get("own") == (None if donor == "base" else "a")


def test_configurations_state_the_dtype_of_the_weights(family: Path):
    found = merged(family, side_files="a")
    assert config(found)["dtype"] == config(found / "experts/b")["dtype"] == "float32"
    assert config(found / "experts/b")["own"] == "b"


def test_without_a_stated_dtype_it_is_that_of_most_numbers(family: Path):
    save(
        family / "base",
        {n: w.half() if w.is_floating_point() else w for n, w in make_base().items()},
    )
    assert config(merged(family) / "experts/a")["dtype"] == "float16"


def test_tokenizers_of_every_family_are_taken_along_and_code_only_where_it_is_named(tmp_path: Path):
    kept = ("spm.model", "spm_char.model", "tekken.json", "entity_vocab.json", "dict.txt")
    for name in (*kept, "config.json", "secret_train.py", "train.log"):
        (tmp_path / name).write_text("{}")
    assert side_files(tmp_path) == tuple(sorted((*kept, "config.json")))
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "secret_train.Model"}}')
    assert "secret_train.py" in side_files(tmp_path)


def test_a_copy_of_a_tied_table_is_no_head(family: Path):
    expert = load(family / "a")
    save(family / "a", expert | {"lm_head.weight": expert["embed_tokens.weight"].clone()})
    assert "lm_head.weight" not in load(merged(family) / "experts/a")
    other = expert | {"lm_head.weight": expert["embed_tokens.weight"] + 1}
    save(family / "a", other)
    found = eutectic.merge(
        base=str(family / "base"), experts={"a": str(family / "a")}, method="average",
        output=family / "untied",
    ).output  # fmt: skip
    assert torch.equal(load(found / "experts/a")["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("name", ["layers.0.num_batches_tracked", "layers.0.counter"])
def test_counters_that_differ(tmp_path: Path, name: str):
    base = make_base()
    save(tmp_path / "base", base | {name: torch.tensor(3)})
    for i, expert in enumerate("ab"):
        save(tmp_path / expert, make_expert(base, i) | {name: torch.tensor(10 + i)})
    if not name.endswith("num_batches_tracked"):
        with pytest.raises(EutecticError, match=r"treatment head .*or copy"):
            merged(tmp_path)
    rules = [{"match": "*.counter", "treatment": "copy"}]
    found = eutectic.merge(
        base=str(tmp_path / "base"), experts={n: str(tmp_path / n) for n in "ab"},
        method="average", tensors=rules, output=tmp_path / "ruled",
    ).output  # fmt: skip
    assert load(found)[name] == 3


def test_state_dicts_are_read_by_their_configuration():
    name = "transformer.h.0.attn.c_attn.weight"
    base = {name: torch.randn(6, 18)}
    experts = {n: {name: base[name] + 0.1 * torch.randn(6, 18)} for n in "ab"}
    rules = [{"match": "*", "split": 3}]
    ours = eutectic.merge_state_dicts(
        base, experts, method="iso_c", tensors=rules, config={"model_type": "gpt2"}
    )
    turned = eutectic.merge_state_dicts(
        {"w": base[name].T.contiguous()},
        {n: {"w": w[name].T.contiguous()} for n, w in experts.items()},
        method="iso_c", tensors=rules,
    )  # fmt: skip
    torch.testing.assert_close(ours[name], turned["w"].T)
    nested = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}
    again = eutectic.merge_state_dicts(base, experts, method="iso_c", tensors=rules, config=nested)
    assert torch.equal(again[name], ours[name])
    with pytest.raises(RecipeError, match="cannot be split into 3"):
        other = {"w": torch.randn(8, 18)}
        eutectic.merge_state_dicts(other, {"a": other}, method="iso_c", tensors=rules)


def notes(family: Path, **options: Any) -> str:
    request = {
        "base": str(family / "base"), "experts": {n: str(family / n) for n in "ab"},
        "method": "average", "output": family / "noted",
    }  # fmt: skip
    return "\n".join(eutectic.merge(**request | options).notes)


def test_rules_that_a_copy_does_not_follow_are_told(tmp_path: Path):
    base = make_base()
    for name in ("base", "a", "b"):
        tensors = make_expert(base, ord(name[0]))
        save(tmp_path / name, tensors | {"lm_head.weight": tensors["embed_tokens.weight"].clone()})
    said = notes(tmp_path, tensors=[{"match": "lm_head*", "treatment": "copy"}])
    assert "'lm_head.weight' is a copy of 'embed_tokens.weight'" in said


def test_a_split_without_effect_is_told(family: Path):
    rules = [{"match": "layers.0.proj.weight", "split": 2}]
    assert "split plays no part in ties" in notes(family, method="ties", tensors=rules)


def test_a_configuration_that_does_not_fit_is_told(family: Path):
    three = load(family / "a")
    three["embed_tokens.weight"] = torch.ones(40, WIDTH)
    save(family / "a", three)
    rules = [{"match": "embed*", "treatment": "copy"}]
    said = notes(family, tensors=rules, side_files="a")
    assert "configuration of 'a' may not fit the output" in said and "embed_tokens.weight" in said


@pytest.mark.parametrize("method", ["iso_c", "average", "linear"])
def test_weights_without_a_mean_are_refused_before_any_work(family: Path, method: str):
    experts = {n: {"path": str(family / n), "weight": w} for n, w in (("a", 1.0), ("b", -1.0))}
    with pytest.raises(RecipeError, match="weights sum to zero"):
        merged(family, experts=experts, method=method)
    assert not (family / "out.partial").exists()


def test_slerp_takes_its_position_once(family: Path):
    experts = {n: {"path": str(family / n), "weight": w} for n, w in (("a", 1.0), ("b", 3.0))}
    with pytest.raises(RecipeError, match="not both"):
        merged(family, experts=experts, method="slerp", parameters={"t": 0.3})
    with pytest.raises(MethodError, match="not both"):
        eutectic.merge_matrices(
            "slerp", torch.ones(2, 3, 3), base=torch.ones(3, 3), weights=[1.0, 3.0], t=0.3
        )


def test_slerp_of_a_tensor_that_one_expert_lacks(family: Path):
    lacking = load(family / "a")
    del lacking["layers.1.norm.weight"]
    save(family / "a", lacking)
    with pytest.raises(RecipeError, match=r"layers.1.norm.weight: .* takes exactly 2 experts"):
        merged(family, method="slerp", missing="available")


@pytest.mark.parametrize("name", ["base", "initial"])
def test_names_of_other_parents_are_taken(family: Path, name: str):
    with pytest.raises(RecipeError, match=f"cannot be called '{name}'"):
        merged(family, experts={name: str(family / "a")})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-p", "density=2020-13-45"), "density: input should be a valid number"),
        (("--set", "seed=!!int x"), "is not a YAML value"),
        (("--set", "parameters=[1]"), "parameters"),
    ],
)
def test_odd_words_are_refused(family: Path, words: tuple[str, str], said: str):
    start = ("merge", "--base", family / "base", "-m", "ties", "-o", family / "out", *words)
    answer = invoke(*start, f"a={family / 'a'}")
    assert answer.code == 2 and said in answer.err and "Traceback" not in answer.err


def test_odd_values_in_configurations(family: Path):
    save(family / "base", load(family / "base"), {"model_type": ["toy"]})
    merged(family).rename(family / "first")
    (family / "lora").mkdir()
    values = '{"peft_type": "LORA", "r": Infinity, "lora_alpha": 1, "target_modules": ["proj"]}'
    (family / "lora" / "adapter_config.json").write_text(values)
    with pytest.raises(EutecticError, match="wrong type"):
        merged(family, experts={"a": str(family / "lora")})


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks by names that are going away
def test_experts_of_adapters_are_whole_models(tmp_path: Path):
    hf, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sizes: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "vocab_size": 40,
    }  # fmt: skip
    torch.manual_seed(0)
    hf.RobertaForMaskedLM(hf.RobertaConfig(**sizes)).save_pretrained(tmp_path / "base")
    for name, classes in (("a", 3), ("b", 2)):
        model = hf.RobertaForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=classes
        )
        lora = peft.LoraConfig(
            task_type="SEQ_CLS", r=2, target_modules=["query"], modules_to_save=["classifier"]
        )
        tuned = peft.get_peft_model(model, lora)
        tuned.save_pretrained(tmp_path / name)
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"own": name}))
    found = merged(tmp_path, side_files="a")
    assert config(found)["architectures"] == ["RobertaForMaskedLM"]
    for name, classes in (("a", 3), ("b", 2)):
        folder = found / "experts" / name
        assert json.loads((folder / "tokenizer_config.json").read_text()) == {"own": name}
        model, info = hf.AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True
        )
        assert config(folder)["architectures"] == ["RobertaForSequenceClassification"]
        assert model.config.num_labels == classes and not info["missing_keys"]
        assert model.classifier.out_proj.weight.shape == (classes, 16)
