"""Every kind end to end on tiny models, against direct computation; heads, resuming, refusals."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import eutectic
from eutectic.errors import CheckpointError, RequestError
from eutectic.evaluation import (
    file_keys,
    load_head,
    load_model,
    load_tasks,
    outputs,
    pairs,
    prepare,
    put_tensors,
    score,
)
from eutectic.evaluation.results import results_schema
from evaluation import world
from helpers.cli import invoke

LABELS = ("no", "maybe", "yes")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [{"text": t, "label": LABELS[i % 3]} for i, t in enumerate(world.sentences(40))]
    return world.jsonl(tmp_path / "texts.jsonl", rows)


def _one(tmp_path: Path, **spec):
    return load_tasks(world.tasks(tmp_path / "one.yaml", a=spec))["a"]


def _plain_logits(model, folder: Path, texts: list[str]) -> torch.Tensor:
    tokenizer = world.hf.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        rows = [model(**tokenizer(t, return_tensors="pt")).logits[0] for t in texts]
    return torch.stack(rows)


@pytest.mark.transformers_versions
def test_text_classification_in_row_order(tmp_path: Path, texts: Path):
    folder = world.save(world.make("bert"), tmp_path / "m")
    task = _one(tmp_path, kind="text-classification", data=str(texts))
    ready = prepare(task, "test", folder, batch_size=7)
    model = load_model(folder, task)
    found = outputs(model, ready)
    expected = _plain_logits(model, folder, world.sentences(40))
    assert torch.allclose(found, expected, atol=1e-5)
    truth = torch.tensor([i % 3 for i in range(40)])
    assert score(found, ready).value == pytest.approx(
        float((expected.argmax(1) == truth).double().mean())
    )
    assert torch.allclose(outputs(model, ready, dtype="bfloat16"), expected, atol=0.3)


def test_linear_head_on_pooled_features(tmp_path: Path, texts: Path):
    model = world.make("encoder")
    folder = world.save(model, tmp_path / "m")
    weight, bias = torch.randn(3, 16), torch.randn(3)
    save_file({"weight": weight, "bias": bias}, tmp_path / "h.safetensors")
    common = {"kind": "text-classification", "data": str(texts), "head": "h.safetensors"}
    tokenizer = world.hf.AutoTokenizer.from_pretrained(folder)
    states = [
        model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].detach()
        for t in world.sentences(40)
    ]
    for pooling, pool in (("mean", lambda s: s.mean(0)), ("cls", lambda s: s[0])):
        task = _one(tmp_path, **common, pooling=pooling, normalize=True, labels=list(LABELS))
        ready = prepare(task, "test", folder)
        features = torch.nn.functional.normalize(torch.stack([pool(s) for s in states]), dim=-1)
        assert torch.allclose(outputs(load_model(folder, task), ready), features, atol=1e-5)
        logits = outputs(load_model(folder, task), ready, load_head(task))
        assert torch.allclose(logits, features @ weight.T + bias, atol=1e-5)


def test_pairs_and_regression(tmp_path: Path):
    folder = world.save(world.make("bert", labels=("score",)), tmp_path / "m")
    left, right = world.sentences(30), world.sentences(30, seed=1)
    numbers = np.linspace(-1, 1, 30)
    rows = [
        {"text": a, "text_pair": b, "label": n}
        for a, b, n in zip(left, right, numbers, strict=True)
    ]
    task = _one(tmp_path, kind="regression", data=str(world.jsonl(tmp_path / "p.jsonl", rows)))
    model = load_model(folder, task)
    ready = prepare(task, "test", folder)
    found = outputs(model, ready)
    tokenizer = world.hf.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        one = model(
            **tokenizer(left[3], right[3], return_tensors="pt", truncation=True, max_length=24)
        ).logits
    assert torch.allclose(found[3], one[0], atol=1e-5)
    expected = np.corrcoef(found[:, 0].numpy(), numbers)[0, 1]
    assert score(found, ready).value == pytest.approx(expected, abs=1e-6)


@pytest.mark.transformers_versions
@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_images(tmp_path: Path, kind: str):
    folder = world.save(world.make(kind), tmp_path / "m")
    spec = {"kind": "image-classification", "data": str(world.images(tmp_path / "i", 9))}
    if kind == "clip":
        save_file(
            {"weight": torch.randn(3, 12), "bias": torch.zeros(3)}, tmp_path / "h.safetensors"
        )
        spec |= {
            "head": "h.safetensors",
            "pooling": "pooler",
            "normalize": True,
            "labels": list(LABELS),
        }
    task = _one(tmp_path, **spec)
    ready = prepare(task, "test", folder, batch_size=4)
    found = outputs(load_model(folder, task), ready, load_head(task))
    assert found.shape == (9, 3)
    assert sorted(ready.references) == [0] * 3 + [1] * 3 + [2] * 3
    assert score(found, ready).metric == "accuracy"


def test_maps_of_grey_pictures_are_averaged(tmp_path: Path):
    from PIL import Image

    model = world.make("pyramid")
    folder = world.save(model, tmp_path / "m")
    pictures = world.images(tmp_path / "i", 6)
    weight, bias = torch.randn(3, 16), torch.randn(3)
    save_file({"weight": weight, "bias": bias}, tmp_path / "h.safetensors")
    spec = {"kind": "image-classification", "data": "i", "head": "h.safetensors"}
    task = _one(tmp_path, **spec, labels=list(LABELS))
    ready = prepare(task, "test", folder, batch_size=4)
    found = outputs(load_model(folder, task), ready, load_head(task))
    grey = [
        np.array(Image.open(p).convert("L").resize((8, 8), Image.Resampling.BILINEAR))
        for p in sorted(pictures.rglob("*.png"), key=lambda p: (p.parent.name, p.name))
    ]
    inputs = torch.tensor(np.stack(grey))[:, None].float() / 255
    with torch.no_grad():
        maps = model(inputs).last_hidden_state
    assert torch.allclose(found, maps.flatten(2).mean(2) @ weight.T + bias, atol=1e-5)
    with pytest.raises(RequestError, match="no first token"):
        outputs(
            load_model(folder, task), replace(ready, task=_one(tmp_path, **spec, pooling="cls"))
        )


def test_language_model_loss_and_perplexity(tmp_path: Path, texts: Path):
    folder = world.save(world.make("gpt2"), tmp_path / "m")
    task = _one(tmp_path, kind="language-model", data=str(texts), metric="perplexity")
    model = load_model(folder, task)
    ready = prepare(task, "test", folder, batch_size=7)
    found = score(outputs(model, ready), ready)
    tokenizer = world.hf.AutoTokenizer.from_pretrained(folder)
    total = count = 0.0
    for text in world.sentences(40):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        total, count = total + float(loss) * (ids.shape[1] - 1), count + ids.shape[1] - 1
    assert found.value == pytest.approx(np.exp(total / count), rel=1e-4)


@pytest.mark.transformers_versions
def test_sequence_to_sequence_exact_match(tmp_path: Path):
    model = world.make("t5", seed=5)
    with torch.no_grad():
        model.shared.weight[1] *= 3  # so that some of its outputs end early
    folder = world.save(model, tmp_path / "m")
    tokenizer = world.hf.AutoTokenizer.from_pretrained(folder)
    sources = world.sentences(12)

    def answer(text: str, tokens: int) -> str:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        made = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False)
        return tokenizer.decode(made[0], skip_special_tokens=True)

    # Outputs that do not end by themselves go on when they may, and are then no match.
    targets = [answer(text, 12) for text in sources]
    rows = [{"source": s, "target": f" {t}  "} for s, t in zip(sources, targets, strict=True)]
    data = world.jsonl(tmp_path / "s.jsonl", rows)
    task = _one(tmp_path, kind="sequence-to-sequence", data=str(data))
    ready = prepare(task, "test", folder, batch_size=5)
    found = score(outputs(load_model(folder, task), ready), ready)
    again = [answer(text, ready.generate_tokens) for text in sources]
    expected = [float(a == t) for a, t in zip(again, targets, strict=True)]
    assert found.per_example.tolist() == expected
    assert 0 < found.value < 1


@pytest.mark.parametrize("kind", ["bert", "vit", "t5", "gpt2"])
def test_states_go_in_by_the_files_keys(tmp_path: Path, texts: Path, kind: str):
    from safetensors.torch import load_file

    first = world.save(world.make(kind), tmp_path / "a")
    second = world.save(world.make(kind, seed=1), tmp_path / "b")
    kinds = {
        "bert": "text-classification",
        "vit": "image-classification",
        "t5": "sequence-to-sequence",
        "gpt2": "language-model",
    }
    task = _one(tmp_path, kind=kinds[kind], data=str(texts))
    model, wanted = load_model(first, task), load_model(second, task)
    state = load_file(second / "model.safetensors")
    keys = file_keys(model, {name: t.shape for name, t in state.items()})
    assert set(keys) == set(state)
    put_tensors(model, state, keys)
    for (name, got), want in zip(
        model.state_dict().items(), wanted.state_dict().values(), strict=True
    ):
        assert torch.equal(got, want), name


@pytest.fixture
def family(tmp_path: Path, texts: Path) -> Path:
    """A bare base, an expert with a head of its own, a merged folder with and without its head."""
    base = world.make("encoder")
    world.save(base, tmp_path / "base")
    expert = world.make("bert", seed=1)
    world.save(expert, tmp_path / "expert")
    eutectic.merge(
        base=str(tmp_path / "base"),
        experts={"a": str(tmp_path / "expert")},
        method="task_arithmetic",
        scale=0.5,
        output=tmp_path / "merged",
    )
    world.tasks(tmp_path / "tasks.yaml", a={"kind": "text-classification", "data": "texts.jsonl"})
    return tmp_path


def test_bodies_borrow_the_experts_head(family: Path):
    from safetensors.torch import load_file

    task = load_tasks(family / "tasks.yaml")["a"]
    with pytest.raises(CheckpointError, match=r"classifier.weight.\nName .*--expert a=PATH"):
        load_model(family / "base", task)
    model = load_model(family / "base", task, expert=family / "expert")
    state, head = model.state_dict(), load_file(family / "expert" / "model.safetensors")
    body = load_file(family / "base" / "model.safetensors")
    assert torch.equal(state["classifier.weight"], head["classifier.weight"])
    for name, values in body.items():
        assert torch.equal(state[f"bert.{name}"], values)
    merged = load_model(family / "merged", task)
    assert torch.equal(merged.classifier.weight, head["classifier.weight"])


def test_results_and_their_relations(family: Path):
    results = eutectic.evaluate(
        family / "tasks.yaml",
        base=family / "base",
        experts={"a": family / "expert"},
        models={"m": family / "merged"},
        output=family / "r.json",
        resamples=200,
    )
    found = {r.checkpoint: r for r in results.results}
    base, expert, merged = (found[n].value for n in ("base", "a", "m"))
    assert found["m"].normalized == pytest.approx(merged / expert)
    if expert != base:
        assert found["m"].nai == pytest.approx((merged - base) / (expert - base))
    assert found["a"].normalized_interval == (1.0, 1.0)
    low, high = found["m"].interval
    assert low <= merged <= high and high - low == pytest.approx(
        2 * 1.96 * np.sqrt(merged * (1 - merged) / 40), rel=0.35
    )
    expected = np.sqrt(merged * (1 - merged) / 40)
    assert found["m"].standard_error == pytest.approx(expected, rel=0.2)
    assert json.loads((family / "r.json").read_text()) == json.loads(results.model_dump_json())


def test_differences_between_models_are_paired(family: Path):
    models = {"m": family / "merged", "same": family / "merged", "other": family / "expert"}
    results = eutectic.evaluate(
        family / "tasks.yaml",
        base=family / "base",
        experts={"a": family / "expert"},
        models=models,
        output=family / "r.json",
    )
    pairs = {(d.checkpoint, d.other): d for d in results.differences}
    names = ("base", *models)
    assert pairs.keys() == set(permutations(names, 2))
    same = pairs["m", "same"]
    assert (same.value, same.interval, same.normalized_interval) == (0, (0, 0), (0, 0))

    right: dict[str, np.ndarray] = {}
    for line in (family / "r.json.outcomes.jsonl").read_text().splitlines():
        item = json.loads(line)
        right[item["checkpoint"]] = np.equal(item["predictions"], item["references"])
    expert = right["a"]  # the same weights as `other`
    gap = right["m"].astype(float) - expert
    found = pairs["m", "other"]
    assert found.value == pytest.approx(gap.mean())
    assert found.normalized == pytest.approx(gap.mean() / expert.mean())
    low, high = found.interval
    assert low <= found.value <= high
    assert high - low == pytest.approx(2 * 1.96 * gap.std() / np.sqrt(len(gap)), rel=0.2)
    reverse = pairs["other", "m"]
    assert reverse.interval == pytest.approx((-high, -low))


def test_results_tell_which_heads_were_put_on(tmp_path: Path, texts: Path):
    hashes = {}
    for role in ("head", "base_head"):
        save_file({"weight": torch.randn(3, 16), "bias": torch.zeros(3)}, tmp_path / role)
        hashes[role] = hashlib.sha256((tmp_path / role).read_bytes()).hexdigest()
    model = world.save(world.make("bert"), tmp_path / "m")
    for roles in ((), ("head",), ("head", "base_head")):
        spec = {"kind": "text-classification", "data": str(texts), **{r: r for r in roles}}
        file = world.tasks(tmp_path / "t.yaml", a=spec)
        task = eutectic.evaluate(file, models=[model], resamples=0).tasks[0]
        assert task.head_hashes == {role: hashes[role] for role in roles}


def test_finished_pairs_are_not_computed_again(family: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    original = pairs.outputs
    monkeypatch.setattr(pairs, "outputs", lambda *a, **k: calls.append(1) or original(*a, **k))

    def evaluate():
        calls.clear()
        return eutectic.evaluate(
            family / "tasks.yaml", base=family / "base", experts={"a": family / "expert"},
            output=family / "r.json", resamples=10,
        )  # fmt: skip

    first = evaluate()
    assert len(calls) == 2
    journal = family / "r.json.outcomes.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])  # as a kill leaves it
    assert evaluate() == first
    assert len(calls) == 1
    world.save(world.make("bert", seed=2), family / "expert")
    evaluate()
    assert len(calls) == 2  # the expert, and the base with the expert's head


def test_functions_run_only_when_trusted(family: Path):
    (family / "f.py").write_text("def f(folder, rows, gain):\n    return [gain] * len(rows)\n")
    spec = {
        "kind": "function",
        "function": "f.py:f",
        "data": "texts.jsonl",
        "options": {"gain": 0.5},
    }
    path = world.tasks(family / "f.yaml", a=spec)
    with pytest.raises(RequestError, match="--trust-code"):
        eutectic.evaluate(path, models=[family / "base"])
    results = eutectic.evaluate(path, models=[family / "base"], trust_code=True)
    assert (results.results[0].value, results.results[0].n) == (0.5, 40)


def test_command_line(family: Path):
    words = ["evaluate", f"m={family / 'merged'}", "-t", family / "tasks.yaml", "--resamples", 20]
    words += ["--base", family / "base", "-e", f"a={family / 'expert'}"]
    answer = invoke(*words)
    assert answer.code == 0, answer.err
    assert "NAI" in answer.out and "n = 40" in answer.out
    answer = invoke(*words, "--json", "--limit", 10)
    assert json.loads(answer.out)["results"][0]["n"] == 10
    assert "− the best's" not in answer.out
    answer = invoke(*words, f"x={family / 'expert'}")
    _, _, compared = answer.out.partition("mean − the best's [95 %] % of expert [95 %] ")
    other, _, best = compared.partition(" best ")
    assert {other.split()[0], best.split()[0].rstrip(";")} == {"m", "x"}
    refused = invoke(*words, "--split", "tset")
    assert (
        refused.code == 2 and "split is one of proxy, validation, test; got 'tset'" in refused.err
    )
    assert "no split 'proxy'" in invoke(*words, "--split", "proxy").err


def test_published_schema_is_current():
    published = Path(__file__).parents[2] / "docs" / "schemas" / "results-1.json"
    text = json.dumps(results_schema(), indent=1, ensure_ascii=False) + "\n"
    assert published.read_text() == text


@pytest.mark.transformers_versions
def test_routed_models_in_every_mode(tmp_path: Path, texts: Path):
    from eutectic.routed import build_routed

    kind = "text-classification"
    merged, expert = world.make("bert"), world.make("bert", seed=1)
    world.save(merged, tmp_path / "plain")
    tokenizer = world.tokenizer()
    batch = tokenizer(world.sentences(20), padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    statistics = {"a": eutectic.collect(expert, [dict(batch)])}
    routed = build_routed(
        merged, {"a": expert.state_dict()}, statistics, None, rank=8, router="prototype"
    )
    routed.save_pretrained(tmp_path / "routed")
    tokenizer.save_pretrained(tmp_path / "routed")
    path = world.tasks(tmp_path / "r.yaml", a={"kind": kind, "data": str(texts)})

    def predictions(model: str, mode: str) -> list[float]:
        output = tmp_path / f"{model}-{mode}.json"
        results = eutectic.evaluate(
            path, models=[tmp_path / model], routing=mode, output=output, resamples=0
        )  # type: ignore[arg-type]
        assert results.checkpoints[0].routing == (mode if model == "routed" else None)
        return json.loads(output.with_name(f"{output.name}.outcomes.jsonl").read_text())[
            "predictions"
        ]

    plain = predictions("plain", "route")
    assert predictions("routed", "base") == plain
    # A single expert is always chosen.
    oracle = predictions("routed", "oracle")
    assert oracle == predictions("routed", "route")
    assert oracle != plain
