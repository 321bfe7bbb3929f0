"""Per-task heads: who keeps them, and whether the folders load.

Guards the definition of a head (a rule names it, the base lacks it, or shapes differ), the three
policies, and that `experts/<name>/` shares the merged body on disk and loads in transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import eutectic
from helpers.folders import Tensors, load, make_base, make_expert, save, save_sharded
from helpers.merging import merge_files, save_inputs


def with_heads(base: Tensors) -> dict[str, Tensors]:
    """Return two experts with a head that the base lacks, of different sizes."""
    experts = {"a": make_expert(base, 1), "b": make_expert(base, 2)}
    for name, classes in (("a", 2), ("b", 5)):
        experts[name]["classifier.weight"] = torch.full((classes, 16), float(classes))
    return experts


def test_heads_that_the_base_lacks_get_a_folder_each(tmp_path: Path) -> None:
    base = make_base()
    experts = with_heads(base)
    merged, report = merge_files(tmp_path, base, experts, method="average")
    assert set(merged) == set(base)
    assert report.heads == {"a": ("classifier.weight",), "b": ("classifier.weight",)}
    for name in experts:
        own = load(tmp_path / "merged/experts" / name)
        assert set(own) == {*base, "classifier.weight"}
        assert torch.equal(own["classifier.weight"], experts[name]["classifier.weight"])
        assert all(torch.equal(own[key], merged[key]) for key in base)


@pytest.mark.parametrize("policy", ["base", "drop"])
def test_without_folders_the_output_is_a_body_alone(policy: str, tmp_path: Path) -> None:
    base = make_base()
    experts = with_heads(base)
    merged, report = merge_files(tmp_path, base, experts, method="average", heads=policy)
    assert set(merged) == set(base)
    assert not (tmp_path / "merged/experts").exists()
    assert any("left out because of heads" in note for note in report.notes)


def test_a_head_in_the_base_is_kept_there_or_dropped_and_merged_by_nobody(tmp_path: Path) -> None:
    base = {**make_base(), "classifier.weight": torch.zeros(3, 16)}
    experts = with_heads(base)
    kept, _ = merge_files(tmp_path / "kept", base, experts, method="average")
    assert torch.equal(kept["classifier.weight"], base["classifier.weight"])
    own = load(tmp_path / "kept/merged/experts/b")
    assert torch.equal(own["classifier.weight"], experts["b"]["classifier.weight"])
    dropped, report = merge_files(
        tmp_path / "dropped", base, experts, method="average", heads="drop"
    )
    assert "classifier.weight" not in dropped
    assert any("left out of the output: classifier.weight" in note for note in report.notes)


def test_a_rule_makes_a_head_even_where_shapes_agree(tmp_path: Path) -> None:
    base = make_base()
    experts = {"a": make_expert(base, 1), "b": make_expert(base, 2)}
    rules = [{"match": "layers.1.*", "treatment": "head"}]
    merged, _ = merge_files(tmp_path, base, experts, method="average", tensors=rules)
    name = "layers.1.proj.weight"
    assert torch.equal(merged[name], base[name])
    assert torch.equal(load(tmp_path / "merged/experts/a")[name], experts["a"][name])


def test_shards_without_a_head_are_the_same_file(tmp_path: Path) -> None:
    base = make_base()
    names = list(base)
    experts = with_heads({**base, "classifier.weight": torch.zeros(3, 16)})
    shards = {
        "model-00001-of-00002.safetensors": {n: base[n] for n in names[:4]},
        "model-00002-of-00002.safetensors": {
            **{n: base[n] for n in names[4:]},
            "classifier.weight": torch.zeros(3, 16),
        },
    }
    save_sharded(tmp_path / "base", shards)
    paths = {n: save(tmp_path / n, t) for n, t in experts.items()}
    output = tmp_path / "merged"
    eutectic.merge(base=tmp_path / "base", experts=paths, method="average", output=output)
    first = [
        output / "model-00001-of-00002.safetensors",
        output / "experts/a/model-00001-of-00003.safetensors",
        output / "experts/b/model-00001-of-00003.safetensors",
    ]
    assert len({p.stat().st_ino for p in first}) == 1
    # The shard that held the base's head exists once without it, shared by both experts.
    second = [output / f"experts/{n}/model-00002-of-00003.safetensors" for n in "ab"]
    assert len({p.stat().st_ino for p in second}) == 1
    assert second[0].stat().st_ino != (output / shards_second(shards)).stat().st_ino
    for name in experts:
        index = json.loads((output / f"experts/{name}/model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == {*base, "classifier.weight"}


def shards_second(shards: dict[str, Any]) -> str:
    return list(shards)[1]


def test_the_output_type_reaches_heads_and_configs(tmp_path: Path) -> None:
    base = make_base()
    experts = with_heads(base)
    config = {"model_type": "toy", "torch_dtype": "float32"}
    merged, _ = merge_files(
        tmp_path, base, experts, method="average", dtype="bfloat16", config=config
    )
    own = load(tmp_path / "merged/experts/a")
    for tensors in (merged, own):
        kinds = {t.dtype for t in tensors.values() if t.is_floating_point()}
        assert kinds == {torch.bfloat16}
        assert tensors["position_ids"].dtype == torch.int64
    for folder in (tmp_path / "merged", tmp_path / "merged/experts/a"):
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


def _save_bert(folder: Path, sharded: bool) -> tuple[Path, dict[str, Path]]:
    from helpers.configs import tiny_model
    from helpers.models import perturb

    options: dict[str, Any] = {"max_shard_size": "8KB"} if sharded else {}
    torch.manual_seed(0)
    base = tiny_model("BertModel")
    base.save_pretrained(folder / "base", **options)
    paths: dict[str, Path] = {}
    for i, labels in enumerate((2, 4)):
        expert = tiny_model("BertForSequenceClassification", num_labels=labels)
        expert.bert.load_state_dict(base.state_dict())
        perturb(expert, 7 + i)
        paths[f"e{labels}"] = folder / f"e{labels}"
        expert.save_pretrained(paths[f"e{labels}"], **options)
    return folder / "base", paths


@pytest.mark.parametrize("sharded", [False, True])
def test_classifiers_over_a_bare_encoder_load_in_transformers(
    sharded: bool, tmp_path: Path
) -> None:
    library: Any = pytest.importorskip("transformers")
    base, experts = _save_bert(tmp_path, sharded)
    output = tmp_path / "merged"
    report = eutectic.merge(base=base, experts=experts, method="iso_c", output=output)
    assert any("prefix 'bert.'" in note for note in report.notes)
    body, info = library.BertModel.from_pretrained(output, output_loading_info=True)
    assert not {k: v for k, v in info.items() if v}
    for name, path in experts.items():
        model, info = library.BertForSequenceClassification.from_pretrained(
            output / "experts" / name, output_loading_info=True
        )
        assert not {k: v for k, v in info.items() if v}
        own = library.BertForSequenceClassification.from_pretrained(path)
        assert model.config.num_labels == own.config.num_labels
        assert torch.equal(model.classifier.weight, own.classifier.weight)
        assert torch.equal(model.classifier.bias, own.classifier.bias)
        merged = body.state_dict()
        assert all(torch.equal(w, merged[k]) for k, w in model.bert.state_dict().items())


HEADED = [  # base, fine-tuned as; tensors of the base that the second has no place for
    ("BertForMaskedLM", "BertForSequenceClassification", "cls.predictions"),
    ("BertForPreTraining", "BertForTokenClassification", "cls.seq_relationship"),
    ("RobertaForMaskedLM", "RobertaForSequenceClassification", "lm_head"),
    ("GPT2LMHeadModel", "GPT2ForSequenceClassification", ""),  # tied: in no file
    ("LlamaForCausalLM", "LlamaForSequenceClassification", "lm_head"),
    ("ViTForImageClassification", "ViTForImageClassification", ""),
    # Its class calls the body `transformer`.
    ("LlamaForCausalLM", "LlamaForQuestionAnswering", "lm_head"),
]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("before", "after", "foreign"), HEADED)
def test_heads_of_the_base_that_an_experts_class_lacks_are_not_in_its_folder(
    before: str, after: str, foreign: str, sharded: bool, tmp_path: Path
) -> None:
    """transformers finds all that the expert's class has in its folder, and nothing besides."""
    library: Any = pytest.importorskip("transformers")
    from helpers.configs import tiny_model
    from helpers.models import perturb

    options: dict[str, Any] = {"max_shard_size": "8KB"} if sharded else {}
    torch.manual_seed(0)
    base = tiny_model(before)
    base.save_pretrained(tmp_path / "base", **options)
    paths: dict[str, Path] = {}
    for i, labels in enumerate((3, 5)):
        expert = tiny_model(after, num_labels=labels)
        body = {k: w for k, w in base.base_model.state_dict().items()}
        expert.base_model.load_state_dict(body, strict=False)
        perturb(expert, 7 + i)
        paths[f"e{labels}"] = tmp_path / f"e{labels}"
        expert.save_pretrained(paths[f"e{labels}"], **options)
    output = tmp_path / "merged"
    eutectic.merge(
        base=tmp_path / "base", experts=paths, method="average", output=output, missing="base"
    )
    whole, info = getattr(library, before).from_pretrained(output, output_loading_info=True)
    assert not {k: v for k, v in info.items() if v}
    if foreign:
        assert any(name.startswith(foreign) for name in whole.state_dict())
    for name, path in paths.items():
        folder = output / "experts" / name
        model, info = getattr(library, after).from_pretrained(folder, output_loading_info=True)
        assert not {k: v for k, v in info.items() if v}
        own = getattr(library, after).from_pretrained(path)
        merged = whole.base_model.state_dict()
        for key, tensor in model.base_model.state_dict().items():
            if key in merged:
                assert torch.equal(tensor, merged[key]), key
        heads = set(model.state_dict()) - {
            f"{model.base_model_prefix}.{key}" for key in model.base_model.state_dict()
        }
        assert heads
        for key in heads:
            assert torch.equal(model.state_dict()[key], own.state_dict()[key]), key


def test_an_adapters_classifier_stands_in_place_of_the_vocabularys(tmp_path: Path) -> None:
    base = {**make_base(), "lm_head.weight": torch.ones(32, 16), "lm_head.bias": torch.ones(32)}
    save(tmp_path / "base", base)
    paths: dict[str, Path] = {}
    for name, head in (("a", "score"), ("b", "lm_head")):
        paths[name] = tmp_path / name
        rows = 3 if head == "score" else 32
        paths[name].mkdir()
        tensors = {
            f"base_model.model.{head}.weight": torch.full((rows, 16), 2.0),
            "base_model.model.layers.0.proj.lora_A.weight": torch.ones(2, 16),
            "base_model.model.layers.0.proj.lora_B.weight": torch.ones(32, 2),
        }
        save_file(tensors, paths[name] / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["proj"]}
        (paths[name] / "adapter_config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    rules = [{"match": "lm_head.*", "treatment": "head"}]
    eutectic.merge(
        base=tmp_path / "base", experts=paths, method="average", output=out, tensors=rules
    )
    assert set(load(out)) == set(base)
    assert set(load(out / "experts/a")) == {*make_base(), "score.weight"}
    assert set(load(out / "experts/b")) == set(base)


def test_a_base_with_a_prefix_and_a_bare_expert(tmp_path: Path) -> None:
    body = make_base()
    base = {f"model.{name}": w for name, w in body.items()}
    experts = {"a": make_expert(body, 1), "b": make_expert(base, 2)}
    experts["a"]["score.weight"] = torch.ones(2, 16)
    merged, _ = merge_files(tmp_path, base, experts, method="average")
    name = "layers.0.proj.weight"
    mean = (experts["a"][name] + experts["b"][f"model.{name}"]) / 2
    torch.testing.assert_close(merged[f"model.{name}"], mean)
    own = load(tmp_path / "merged/experts/a")
    assert set(own) == set(experts["a"])
    assert torch.equal(own[name], merged[f"model.{name}"])


def test_side_files_of_an_expert_win_in_its_own_folder(tmp_path: Path) -> None:
    base = make_base()
    options = save_inputs(tmp_path, base, with_heads(base))
    (tmp_path / "base/tokenizer.json").write_text("base")
    (tmp_path / "base/vocab.txt").write_text("base")
    (tmp_path / "a/tokenizer.json").write_text("a")
    output = tmp_path / "merged"
    eutectic.merge(**options, method="average", output=output)
    assert (output / "tokenizer.json").read_text() == "base"
    assert (output / "experts/a/tokenizer.json").read_text() == "a"
    assert (output / "experts/a/vocab.txt").read_text() == "base"


def test_side_files_may_come_from_an_expert(tmp_path: Path) -> None:
    base = make_base()
    options = save_inputs(tmp_path, base, {"a": make_expert(base, 1), "b": make_expert(base, 2)})
    (tmp_path / "b/tokenizer.json").write_text("b")
    eutectic.merge(**options, method="average", side_files="b", output=tmp_path / "merged")
    assert (tmp_path / "merged/tokenizer.json").read_text() == "b"
