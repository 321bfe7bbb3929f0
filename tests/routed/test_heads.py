"""Heads and routing meet: routed models keep experts' heads, apply, save and evaluate them."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import eutectic
from eutectic.errors import CheckpointError, RequestError
from eutectic.routed import build_routed, find_heads, load_routed, predict, routing
from eutectic.statistics import collect
from evaluation.world import images, jsonl, sentences, tasks, tokenizer
from helpers.cli import invoke
from helpers.configs import tiny_model

pytestmark = [
    pytest.mark.transformers_versions,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
Batch = dict[str, Any]
CLASSES = {"a": 3, "b": 2}


def pixels(seed: int, samples: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shift = 3.0 if seed % 2 else -3.0
    return {"pixel_values": torch.randn(samples, 3, 8, 8, generator=generator) + shift}


def tokens(seed: int, samples: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    low = 4 if seed % 2 else 16
    ids = torch.randint(low, low + 10, (samples, 7), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def moved(model: Any, seed: int, size: float = 0.1) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model.eval()


def family(
    folder: Path, base: Any, expert: str, batch: Callable[..., Batch], **merging: Any
) -> Path:
    """Save a base and two experts of it with heads, their merge, and their statistics."""
    base.eval().save_pretrained(folder / "base")
    for t, (name, classes) in enumerate(CLASSES.items()):
        names = {i: f"{name}{i}" for i in range(classes)}
        own = {
            "num_labels": classes,
            "id2label": names,
            "label2id": {v: k for k, v in names.items()},
        }
        model = tiny_model(expert, **own)
        state = {n: v for n, v in base.state_dict().items() if "classifier" not in n}
        prefix = f"{model.base_model_prefix}."
        state = {n if n.startswith(prefix) else prefix + n: v for n, v in state.items()}
        model.load_state_dict(state, strict=False)
        moved(model, 10 + t).save_pretrained(folder / name)
        collect(model, [batch(t, 30)], folder / f"{name}.stats.safetensors")
    experts = {name: folder / name for name in CLASSES}
    eutectic.merge(
        base=folder / "base",
        experts=experts,
        method="average",
        output=folder / "merged",
        **merging,
    )
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    from transformers import ViTImageProcessor

    base = moved(tiny_model("ViTModel"), 1)
    base.pooler = None  # as most published bases have none
    found = family(folder, base, "ViTForImageClassification", pixels)
    for kept in ("merged", *CLASSES):
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / kept)
    return found


def route(folder: Path, *further: Any) -> Any:
    words: list[Any] = ["route", folder / "merged", *(f"{n}={folder / n}" for n in CLASSES)]
    for name in CLASSES:
        words += ["-s", f"{name}={folder / name}.stats.safetensors"]
    return invoke(*words, "--rank", 4, *further)


def test_a_routed_folder_holds_no_random_tensor(vit: Path, tmp_path: Path):
    assert route(vit, "-o", tmp_path / "routed").code == 0
    held = load_file(tmp_path / "routed/model.safetensors")
    merged = load_file(vit / "merged/model.safetensors")
    assert held.keys() == merged.keys() and not any("pooler" in key for key in held)
    assert all(torch.equal(held[key], merged[key]) for key in held)
    assert load_routed(tmp_path / "routed").pooler is None


def test_heads_are_kept_applied_saved_and_loaded(vit: Path, tmp_path: Path):
    answer = route(vit, "-o", tmp_path / "routed")
    assert answer.code == 0 and "heads of a, b (ViTForImageClassification)" in answer.out
    routed = load_routed(tmp_path / "routed")
    assert list(routed.expert_heads) == ["a", "b"]
    batch = pixels(1)
    for name in CLASSES:
        own = load_file(vit / name / "model.safetensors")
        with torch.no_grad(), routing(routed, mode="oracle", expert=name):
            features = routed(**batch).last_hidden_state[:, 0]
            expected = features @ own["classifier.weight"].T + own["classifier.bias"]
            found = routed.expert_heads[name](**batch).logits
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    routed.save_pretrained(tmp_path / "again")
    again = load_routed(tmp_path / "again")
    for name in CLASSES:
        with torch.no_grad():
            first, second = (m.expert_heads[name](**batch).logits for m in (routed, again))
        assert torch.equal(first, second)
    kept = load_file(tmp_path / "again/heads/a/head.safetensors")
    assert sorted(kept) == ["classifier.bias", "classifier.weight"]


def test_heads_follow_the_routed_model(vit: Path, tmp_path: Path):
    assert route(vit, "-o", tmp_path / "routed").code == 0
    routed = load_routed(tmp_path / "routed").double()
    head = routed.expert_heads["b"]
    assert {p.dtype for p in head.parameters()} == {torch.float64}
    shared = {id(p) for p in routed.parameters()}
    own = [name for name, p in head.named_parameters() if id(p) not in shared]
    assert sorted(own) == ["classifier.bias", "classifier.weight"]


def test_the_chosen_experts_head_is_applied_sample_by_sample(vit: Path, tmp_path: Path):
    assert route(vit, "-o", tmp_path / "routed").code == 0
    routed = load_routed(tmp_path / "routed")
    mixed = {"pixel_values": torch.stack([pixels(t + 4, 5)["pixel_values"] for t in range(2)], 1)}
    batch = {"pixel_values": mixed["pixel_values"].flatten(0, 1)}
    found = predict(routed, batch)
    assert [one.expert for one in found] == ["a", "b"] * 5
    assert [len(one.logits) for one in found] == [3, 2] * 5
    for i, one in enumerate(found):
        alone = {"pixel_values": batch["pixel_values"][i : i + 1]}
        with torch.no_grad():
            logits = routed.expert_heads[one.expert](**alone).logits[0]
        torch.testing.assert_close(one.logits, logits, atol=1e-5, rtol=1e-4)
        assert one.label == f"{one.expert}{int(logits.argmax())}"
    # The caller's head, while the layers go on to decide.
    named = predict(routed, batch, expert="a")
    assert {one.expert for one in named} == {"a"} and {len(one.logits) for one in named} == {3}
    with routing(routed, mode="oracle", expert=["b", "a"] * 5):
        assert [one.expert for one in predict(routed, batch)] == ["b", "a"] * 5
    with routing(routed, mode="base"), pytest.raises(RequestError, match="experts are off"):
        predict(routed, batch)
    with pytest.raises(RequestError, match="no head of 'c'"):
        predict(routed, batch, expert="c")


def test_a_routed_model_is_evaluated_with_the_experts_heads(vit: Path, tmp_path: Path):
    assert route(vit, "-o", tmp_path / "routed").code == 0
    specs = {}
    for name, classes in CLASSES.items():
        labels = [f"{name}{i}" for i in range(classes)]
        data = images(tmp_path / f"data-{name}", 12, labels)
        specs[name] = {"kind": "image-classification", "data": str(data)}
    file = tasks(tmp_path / "tasks.yaml", **specs)
    words = ["evaluate", tmp_path / "routed", "-t", file, "--routing", "oracle", "--json"]
    found = eutectic.evaluate(file, models={"routed": tmp_path / "routed"}, routing="oracle")
    assert invoke(*words).code == 0
    routed = load_routed(tmp_path / "routed")
    from transformers import AutoImageProcessor

    from eutectic.data.images import image_inputs

    processor = AutoImageProcessor.from_pretrained(vit / "merged")
    for result in found.results:
        paths = sorted((tmp_path / f"data-{result.task}").rglob("*.png"))
        batch = image_inputs(paths, processor, "RGB")
        with routing(routed, mode="oracle", expert=result.task):
            said = [one.label for one in predict(routed, batch, expert=result.task)]
        right = sum(label == path.parent.name for label, path in zip(said, paths, strict=True))
        assert result.value == right / len(paths)


def test_a_routed_folder_without_heads_borrows_the_experts(vit: Path, tmp_path: Path):
    """As one that an earlier version wrote; the expert is named beside it."""
    assert route(vit, "-o", tmp_path / "routed").code == 0
    described = json.loads((tmp_path / "routed/routed.json").read_text())
    described.pop("heads")
    (tmp_path / "routed/routed.json").write_text(json.dumps(described))
    shutil.rmtree(tmp_path / "routed/heads")
    data = images(tmp_path / "data", 9, ["a0", "a1", "a2"])
    spec = {"kind": "image-classification", "data": str(data)}
    file = tasks(tmp_path / "tasks.yaml", a=spec)
    lent = eutectic.evaluate(file, experts={"a": vit / "a"}, models=[tmp_path / "routed"])
    assert {r.checkpoint for r in lent.results} == {"a", str(tmp_path / "routed")}
    refused = invoke("evaluate", tmp_path / "routed", "-t", file)
    assert refused.code == 2 and "--expert a=PATH" in refused.err


@pytest.mark.parametrize("pooler", [True, False])
def test_poolers_that_the_experts_have_go_with_their_heads(tmp_path: Path, pooler: bool):
    base = moved(tiny_model("BertModel"), 1)
    if not pooler:
        base.pooler = None
    folder = family(tmp_path, base, "BertForSequenceClassification", tokens)
    assert route(folder, "-o", tmp_path / "routed").code == 0
    routed = load_routed(tmp_path / "routed")
    assert (routed.pooler is not None) == pooler
    kept = load_file(tmp_path / "routed/heads/b/head.safetensors")
    assert any("pooler" in key for key in kept) != pooler
    merged = load_file(tmp_path / "merged/model.safetensors")
    batch = tokens(3)
    for name in CLASSES:
        own = load_file(tmp_path / name / "model.safetensors")
        dense = merged if pooler else {k.removeprefix("bert."): v for k, v in own.items()}
        with torch.no_grad(), routing(routed, mode="oracle", expert=name):
            states = routed(**batch).last_hidden_state[:, 0]
            pooled = states @ dense["pooler.dense.weight"].T + dense["pooler.dense.bias"]
            expected = pooled.tanh() @ own["classifier.weight"].T + own["classifier.bias"]
            found = routed.expert_heads[name](**batch).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_heads_of_the_bases_own_shape_are_kept_by_a_rule(tmp_path: Path):
    base = moved(tiny_model("BertForSequenceClassification", num_labels=2), 1)
    rule = [{"match": "*classifier*", "treatment": "head"}]
    folder = family(tmp_path, base, "BertForSequenceClassification", tokens, tensors=rule)
    assert route(folder, "-o", tmp_path / "routed").code == 0
    routed = load_routed(tmp_path / "routed")
    assert type(routed).__name__ == "BertForSequenceClassification"
    kept = load_file(tmp_path / "routed/heads/b/head.safetensors")
    own = load_file(tmp_path / "b/model.safetensors")
    assert sorted(kept) == ["classifier.bias", "classifier.weight"]
    assert all(torch.equal(kept[key], own[key]) for key in kept)
    batch = tokens(3)
    with torch.no_grad(), routing(routed, mode="oracle", expert="b"):
        pooled = routed.bert(**batch).pooler_output
        expected = pooled @ own["classifier.weight"].T + own["classifier.bias"]
        found = routed.expert_heads["b"](**batch).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_heads_of_another_architecture_are_refused(vit: Path, tmp_path: Path):
    heads = find_heads(vit / "merged", {name: vit / name for name in CLASSES})
    model = moved(tiny_model("BertModel"), 3)
    statistics = {"a": collect(model, [tokens(1)])}
    with pytest.raises(RequestError, match="does not fit a routed BertModel"):
        build_routed(model, {"a": model.state_dict()}, statistics, heads={"a": heads["a"]})
    with pytest.raises(RequestError, match="heads are given for"):
        build_routed(model, {"a": model.state_dict()}, statistics, heads={"z": heads["a"]})


def test_a_damaged_head_is_told(vit: Path, tmp_path: Path):
    assert route(vit, "-o", tmp_path / "routed").code == 0
    (tmp_path / "routed/heads/a/head.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="head.safetensors: the head cannot be read"):
        load_routed(tmp_path / "routed")


def test_a_tokenizer_of_the_experts_own_goes_with_its_head(tmp_path: Path):
    base = moved(tiny_model("BertModel"), 1)
    folder = family(tmp_path, base, "BertForSequenceClassification", tokens)
    for kept in folder.glob("merged/experts/*"):
        tokenizer().save_pretrained(kept)
    assert route(folder, "-o", tmp_path / "routed").code == 0
    assert (tmp_path / "routed/heads/a/tokenizer.json").is_file()
    rows = [{"text": t, "label": f"a{i % 3}"} for i, t in enumerate(sentences(9))]
    spec = {"kind": "text-classification", "data": str(jsonl(tmp_path / "rows.jsonl", rows))}
    found = eutectic.evaluate(tasks(tmp_path / "t.yaml", a=spec), models=[tmp_path / "routed"])
    assert found.results[0].n == 9


def exported(folder: Path, target: Path, **loaded: Any) -> dict[str, Any]:
    """Export a family's routed model by the command line, and load every adapter with peft."""
    peft: Any = pytest.importorskip("peft")
    assert route(folder, "-o", target / "routed", "--export", target / "adapters").code == 0
    found: dict[str, Any] = {}
    for name, loader in loaded.items():
        load = getattr(peft, loader).from_pretrained
        found[name] = load(target / "adapters/experts" / name).eval()
    return found


@pytest.mark.parametrize("around", ["body", "classifier"])
@pytest.mark.filterwarnings("ignore")
def test_exported_adapters_answer_with_their_own_heads(around: str, tmp_path: Path):
    """On a bare body, and on a merged classifier of other classes."""
    base = tiny_model("BertModel") if around == "body" else None
    rules: dict[str, Any] = {}
    if base is None:
        base = tiny_model("BertForSequenceClassification", num_labels=2)
        rules = {"tensors": [{"match": "*classifier*", "treatment": "head"}]}
    folder = family(tmp_path, moved(base, 1), "BertForSequenceClassification", tokens, **rules)
    loader = "AutoPeftModelForSequenceClassification"
    served = exported(folder, tmp_path, a=loader, b=loader)
    routed = load_routed(tmp_path / "routed")
    batch = tokens(3)
    for name, classes in CLASSES.items():
        with torch.no_grad(), routing(routed, mode="oracle", expert=name):
            expected = routed.expert_heads[name](**batch).logits
            found = served[name](**batch).logits
        assert found.shape[1] == classes
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        labels = served[name].get_base_model().config.id2label
        assert labels == {i: f"{name}{i}" for i in range(classes)}
    one, other = (tmp_path / "adapters" / f for f in ("merged", "bases/b"))
    if around == "body":  # one file under two names
        weights = [f / "model.safetensors" for f in (one, other)]
        assert weights[0].samefile(weights[1])


@pytest.mark.filterwarnings("ignore")
def test_exported_adapters_of_pictures_have_their_heads(vit: Path, tmp_path: Path):
    from eutectic.serving import RequestRouter

    served = exported(vit, tmp_path, a="AutoPeftModel", b="AutoPeftModel")
    routed = load_routed(tmp_path / "routed")
    batch = pixels(1)
    for name in CLASSES:
        with torch.no_grad(), routing(routed, mode="oracle", expert=name):
            expected = routed.expert_heads[name](**batch).logits
            torch.testing.assert_close(served[name](**batch).logits, expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad(), routing(routed, mode="vote", record=True) as decisions:
        routed(**batch)
    votes = next(iter(decisions.values())).tolist()
    choose = RequestRouter(tmp_path / "adapters", served["a"])
    assert choose(**batch) == [routed.routing.experts[t] for t in votes]


@pytest.mark.filterwarnings("ignore")
def test_mixed_batches_get_adapters_and_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of as many classes each, on one base."""
    saved = importlib.import_module("peft.utils.other").ModulesToSaveWrapper
    if not hasattr(saved, "_mixed_batch_forward"):
        pytest.skip("this PEFT takes the first adapter's head for all rows of a mixed batch")
    monkeypatch.setitem(CLASSES, "b", 3)
    base = moved(tiny_model("BertModel"), 1)
    folder = family(tmp_path, base, "BertForSequenceClassification", tokens)
    served = exported(folder, tmp_path, a="AutoPeftModelForSequenceClassification")["a"]
    served.load_adapter(tmp_path / "adapters/experts/b", adapter_name="b")
    parts = tokens(4, 4), tokens(5, 4)
    batch = {key: torch.stack([p[key] for p in parts], 1).flatten(0, 1) for key in parts[0]}
    names = ["a", "b", "b", "a"] * 2
    called = ["default" if name == "a" else name for name in names]  # as peft calls the first
    routed = load_routed(tmp_path / "routed")
    with torch.no_grad():
        found = served(**batch, adapter_names=called).logits
        for name in CLASSES:
            with routing(routed, mode="oracle", expert=name):
                expected = routed.expert_heads[name](**batch).logits
            rows = [i for i, own in enumerate(names) if own == name]
            torch.testing.assert_close(found[rows], expected[rows], atol=1e-5, rtol=1e-4)
