"""Vectors of texts: cosines of pairs and rankings, against direct computation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from scipy import stats

import eutectic
from eutectic.drafting import draft
from eutectic.errors import CheckpointError, TaskError
from eutectic.evaluation import load_model, load_tasks, outputs, prepare, score
from eutectic.evaluation.embeddings import ranking_figure, vector_outcomes
from evaluation import world
from helpers.cli import invoke

PAIRS = 30


def sentence_model(folder: Path, pooling: str = "mean", dense: int = 0, seed: int = 0) -> Path:
    """Write a tiny encoder with the modules of sentence-transformers."""
    world.save(world.make("encoder", seed=seed), folder)
    names = ["Transformer", "Pooling", *(["Dense"] if dense else []), "Normalize"]
    paths = ["", *(f"{number}_{name}" for number, name in enumerate(names) if number)]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    told = {"mean": "mean_tokens"}.get(pooling, pooling)
    modes = {f"pooling_mode_{m}": m == told for m in ("cls_token", "max_tokens", "mean_tokens")}
    modes |= {"pooling_mode_lasttoken": pooling == "lasttoken"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    if dense:
        (folder / "2_Dense").mkdir()
        said = {"activation_function": "torch.nn.modules.activation.Tanh"}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(said))
        draw = torch.Generator().manual_seed(seed + 1)
        save_file(
            {
                "linear.weight": torch.randn(dense, 16, generator=draw),
                "linear.bias": torch.randn(dense, generator=draw),
            },
            folder / "2_Dense" / "model.safetensors",
        )
    return folder


def plain_vectors(folder: Path, texts: list[str], pooling: str = "mean") -> torch.Tensor:
    """Embed texts one by one, as sentence-transformers would."""
    tokenizer = world.hf.AutoTokenizer.from_pretrained(folder)
    model = world.hf.AutoModel.from_pretrained(folder).eval()
    found = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        found.append(
            {
                "mean": states.mean(0),
                "cls_token": states[0],
                "max_tokens": states.amax(0),
                "lasttoken": states[-1],
            }[pooling]
        )
    vectors = torch.stack(found)
    if (folder / "2_Dense").is_dir():
        dense = load_file(folder / "2_Dense" / "model.safetensors")
        vectors = torch.tanh(vectors @ dense["linear.weight"].T + dense["linear.bias"])
    return torch.nn.functional.normalize(vectors, dim=-1)


def pair_file(path: Path, seed: int = 5) -> Path:
    left, right = world.sentences(PAIRS, seed), world.sentences(PAIRS, seed + 1)
    scores = np.random.default_rng(seed).uniform(0, 5, PAIRS)
    return world.jsonl(
        path,
        [
            {"text": a, "text_pair": b, "label": float(s)}
            for a, b, s in zip(left, right, scores, strict=True)
        ],
    )


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.transformers_versions
@pytest.mark.parametrize(
    ("pooling", "dense"),
    [("mean", 0), ("cls_token", 0), ("max_tokens", 0), ("lasttoken", 0), ("mean", 6)],
)
def test_similarity_is_the_spearman_of_cosines(tmp_path: Path, pooling: str, dense: int):
    folder = sentence_model(tmp_path / "m", pooling, dense)
    rows = rows_of(data := pair_file(tmp_path / "pairs.jsonl"))
    task = load_tasks(
        world.tasks(tmp_path / "t.yaml", sts={"kind": "sentence-similarity", "data": str(data)})
    )["sts"]
    ready = prepare(task, "test", folder, batch_size=7)
    found = outputs(load_model(folder, task), ready)
    left, right = (
        plain_vectors(folder, [row[name] for row in rows], pooling)
        for name in ("text", "text_pair")
    )
    cosines = (left * right).sum(1)
    own = score(found, ready)
    assert np.allclose(own.outcomes.predictions, cosines, atol=1e-5)
    assert own.metric == "spearman"
    expected = stats.spearmanr(cosines, [row["label"] for row in rows])[0]
    assert own.value == pytest.approx(expected, abs=1e-6)
    assert len(ready) == PAIRS


def retrieval(tmp_path: Path, metric: str | None = None, **more) -> Path:
    """Write 20 documents and 8 queries with relevance in each form."""
    documents = world.sentences(20, seed=9)
    world.jsonl(
        tmp_path / "corpus.jsonl", [{"id": f"d{i}", "text": t} for i, t in enumerate(documents)]
    )
    forms = [["d3", "d7", "d11"], "d5", {"d2": 3, "d8": 1, "d4": 0}, ["d19"]]
    rows = [
        {"text": text, "relevant": forms[i % 4]}
        for i, text in enumerate(world.sentences(8, seed=4))
    ]
    world.jsonl(tmp_path / "queries.jsonl", rows)
    spec = {"kind": "retrieval", "data": "queries.jsonl", "corpus": "corpus.jsonl", **more}
    return world.tasks(tmp_path / "r.yaml", search=spec | ({"metric": metric} if metric else {}))


def naive_ndcg(order: list[int], grades: dict[int, float]) -> float:
    gained = sum(grades.get(d, 0) / math.log2(rank + 2) for rank, d in enumerate(order[:10]))
    best = sorted(grades.values(), reverse=True)[:10]
    return gained / sum(g / math.log2(rank + 2) for rank, g in enumerate(best))


def test_retrieval_ranks_the_corpus(tmp_path: Path):
    folder = sentence_model(tmp_path / "m")
    tasks = retrieval(tmp_path)
    texts = [row["text"] for row in rows_of(tmp_path / "corpus.jsonl")]
    asked = [row["text"] for row in rows_of(tmp_path / "queries.jsonl")]
    cosines = plain_vectors(folder, asked) @ plain_vectors(folder, texts).T
    orders = cosines.argsort(dim=1, descending=True, stable=True).tolist()
    grades = [{3: 1, 7: 1, 11: 1}, {5: 1}, {2: 3, 8: 1}, {19: 1}]
    results = eutectic.evaluate(tasks, models=str(folder))  # one may stand alone
    (own,) = results.results
    expected = [naive_ndcg(order, grades[i % 4]) for i, order in enumerate(orders)]
    assert own.value == pytest.approx(np.mean(expected), abs=1e-6)
    assert own.n == 8
    for metric, figure in (
        ("recall_at_10", lambda o, g: len(set(o[:10]) & set(g)) / len(g)),
        (
            "mrr_at_10",
            lambda o, g: max([1 / (r + 1) for r, d in enumerate(o[:10]) if d in g] + [0]),
        ),
    ):
        (found,) = eutectic.evaluate(retrieval(tmp_path, metric), models={"m": folder}).results
        values = [figure(order, grades[i % 4]) for i, order in enumerate(orders)]
        assert found.value == pytest.approx(np.mean(values), abs=1e-6)


def test_ndcg_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    for _ in range(20):
        truth = draw.integers(0, 4, 30).astype(float)
        truth[0] = 1
        scores = draw.normal(size=30)
        order = np.argsort(-scores, kind="stable").tolist()
        relevant = {i: g for i, g in enumerate(truth) if g}
        assert ranking_figure("ndcg_at_10", order, relevant) == pytest.approx(
            sklearn.ndcg_score([truth], [scores], k=10)
        )


@pytest.mark.parametrize("metric", ["ndcg_at_10", "recall_at_10", "mrr_at_10"])
def test_of_equal_cosines_all_orders_count_alike(metric, tmp_path):
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(1)
    rows = [{"id": i, "text": str(i)} for i in range(14)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "queries.jsonl").write_text('{"text": "q", "relevant": [0]}')
    spec = {"kind": "retrieval", "metric": metric, "data": str(tmp_path / "queries.jsonl")}
    spec["corpus"] = str(tmp_path / "corpus.jsonl")
    task = load_tasks(world.tasks(tmp_path / "t.yaml", a=spec))["a"]
    # All alike; two that lead, then twelve; four groups of which the third crosses the tenth rank.
    for scores in (np.zeros(14), np.r_[np.zeros(12), 1, 1], draw.permutation(14) // 4 / 4):
        relevant = {0: 1.0, 5: 2.0, 13: 1.0}
        vectors = torch.tensor(np.r_[[[1, 0]], np.c_[scores, np.sqrt(1 - scores**2)]])
        found = vector_outcomes(task, vectors, [relevant]).predictions[0]
        orders = [np.lexsort((draw.random(14), -scores)).tolist() for _ in range(6000)]
        drawn = [ranking_figure(metric, order, relevant) for order in orders]
        assert found == pytest.approx(np.mean(drawn), abs=5 * np.std(drawn) / 6000**0.5 + 1e-9)
        if metric == "ndcg_at_10":
            truth = [relevant.get(i, 0) for i in range(14)]
            assert found == pytest.approx(sklearn.ndcg_score([truth], [scores], k=10))
    # A product's last bit depends on where a document stands; of equal documents it tells nothing.
    questions = torch.randn(64, 384, generator=torch.Generator().manual_seed(0))
    alike = torch.cat([questions, questions[:1].expand(14, -1)])
    found = vector_outcomes(task, alike, [{0: 1.0}] * 64).predictions
    assert np.ptp(found) == 0 and found[0] == pytest.approx(
        np.mean([ranking_figure(metric, np.roll(range(14), k).tolist(), {0: 1}) for k in range(14)])
    )


def test_perfect_ranking_and_none():
    assert ranking_figure("ndcg_at_10", [4, 2, 9], {4: 2.0, 2: 1.0}) == 1.0
    assert ranking_figure("ndcg_at_10", [1, 3], {4: 2.0}) == 0.0
    assert ranking_figure("mrr_at_10", [1, 4], {4: 2.0}) == 0.5


def test_pooling_of_the_task_replaces_the_checkpoints(tmp_path: Path):
    folder = sentence_model(tmp_path / "m", "mean")
    data = pair_file(tmp_path / "pairs.jsonl")
    spec = {"kind": "sts", "data": str(data), "pooling": "cls"}
    task = load_tasks(world.tasks(tmp_path / "t.yaml", a=spec))["a"]
    assert task.kind == "sentence-similarity"
    ready = prepare(task, "test", folder)
    found = score(outputs(load_model(folder, task), ready), ready).outcomes.predictions
    rows = rows_of(data)
    left, right = (
        plain_vectors(folder, [row[n] for row in rows], "cls_token") for n in ("text", "text_pair")
    )
    assert np.allclose(found, (left * right).sum(1), atol=1e-5)


def test_prompts_and_lengths_are_the_checkpoints(tmp_path: Path):
    folder = sentence_model(tmp_path / "m")
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "w1 w2 ", "passage": "w3 "}, "default_prompt_name": None})
    )
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 5}))
    task = load_tasks(retrieval(tmp_path))["search"]
    ready = prepare(task, "test", folder)
    width = max(batch["input_ids"].shape[1] for batch in ready.batches)
    assert width == 5
    rows = torch.cat([batch["input_ids"][:, :2] for batch in ready.batches])
    first = torch.empty_like(rows)
    first[ready.order] = rows
    assert first[:8].tolist() == [[4, 5]] * 8  # w1 w2
    assert set(first[8:, 0].tolist()) == {6}  # w3


def test_merged_dense_modules_are_run(tmp_path: Path):
    """Base and experts have a Dense module each; the merged one is measured, and tuned."""
    base = sentence_model(tmp_path / "base", dense=6)
    experts = {n: sentence_model(tmp_path / n, dense=6, seed=s) for n, s in (("a", 3), ("b", 4))}
    out = tmp_path / "out"
    eutectic.merge(base=base, experts=experts, method="average", output=out)
    merged = load_file(out / "2_Dense" / "model.safetensors")["linear.weight"]
    own = [load_file(e / "2_Dense" / "model.safetensors") for e in experts.values()]
    assert torch.allclose(
        merged, (own[0]["linear.weight"] + own[1]["linear.weight"]) / 2, atol=1e-6
    )
    data = pair_file(tmp_path / "pairs.jsonl")
    proxy = pair_file(tmp_path / "proxy.jsonl", seed=50)
    spec = {
        "kind": "sentence-similarity",
        "data": {"test": str(data), "proxy": str(proxy)},
    }
    tasks = world.tasks(tmp_path / "t.yaml", a=spec)
    results = eutectic.evaluate(tasks, base=base, experts={"a": experts["a"]}, models={"m": out})
    rows = rows_of(data)
    left, right = (plain_vectors(out, [row[n] for row in rows]) for n in ("text", "text_pair"))
    expected = stats.spearmanr((left * right).sum(1), [row["label"] for row in rows])[0]
    found = next(r for r in results.results if r.checkpoint == "m")
    assert found.value == pytest.approx(expected, abs=1e-6)
    # At α = 1 the merge of one expert is that expert: no distance is left between their vectors.
    recipe = {
        "base": str(base),
        "experts": {"a": str(experts["a"])},
        "method": "task_arithmetic",
        "scale": {"search": "divergence", "tasks": str(tasks), "range": [0.5, 2.0]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    report = eutectic.merge(tmp_path / "recipe.yaml", output=tmp_path / "tuned")
    assert report.scale == pytest.approx(1.0, abs=0.1)


def test_faults_are_told_in_words(tmp_path: Path):
    folder = sentence_model(tmp_path / "m")
    tasks = retrieval(tmp_path)
    rows = [
        {"text": "w1 w2", "relevant": ["d1", "nowhere"]},
        {"text": "w3", "relevant": {"d1": -1}},
        {"text": "w4", "relevant": []},
    ]
    world.jsonl(tmp_path / "queries.jsonl", rows)
    with pytest.raises(TaskError) as caught:
        eutectic.evaluate(tasks, models=[folder])
    told = str(caught.value)
    assert "row 1" in told and "'nowhere'" in told
    assert "-1" in told and "no document is relevant" in told and "labels" not in told

    world.jsonl(tmp_path / "corpus.jsonl", [{"id": "d1", "text": "w1"}, {"id": "d1", "text": "w2"}])
    with pytest.raises(TaskError, match="has the id 'd1' of row 1"):
        eutectic.evaluate(tasks, models=[folder])

    listed = json.loads((folder / "modules.json").read_text())
    listed[2] = listed[2] | {"path": "2_LSTM", "type": "sentence_transformers.models.LSTM"}
    (folder / "modules.json").write_text(json.dumps(listed))
    data = pair_file(tmp_path / "pairs.jsonl")
    other = world.tasks(tmp_path / "t.yaml", a={"kind": "sentence-similarity", "data": str(data)})
    with pytest.raises(CheckpointError, match="2_LSTM is a LSTM, which is not run here"):
        eutectic.evaluate(other, models=[folder])


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"kind": "retrieval", "data": "q.jsonl"}, "`corpus` and the kind 'retrieval'"),
        ({"kind": "sts", "data": "q.jsonl", "corpus": "q.jsonl"}, "`corpus` and the kind"),
        ({"kind": "sts", "data": "q.jsonl", "normalize": True}, "need `head`"),
        ({"kind": "regression", "data": "q.jsonl", "pooling": "cls"}, "pooling needs `head`"),
        (
            {"kind": "sts", "data": "q.jsonl", "metric": "ndcg_at_10"},
            "is none of sentence.*pearson.$",
        ),
    ],
)
def test_tasks_that_do_not_fit_together(tmp_path: Path, spec: dict, told: str):
    (tmp_path / "q.jsonl").write_text("{}\n")
    with pytest.raises(TaskError, match=told):
        load_tasks(world.tasks(tmp_path / "t.yaml", a=spec))


def test_another_corpus_is_another_result(tmp_path: Path):
    folder = sentence_model(tmp_path / "m")
    tasks = retrieval(tmp_path)
    before = eutectic.evaluate(tasks, models=[folder], output=tmp_path / "r.json")
    rows = rows_of(tmp_path / "corpus.jsonl")
    world.jsonl(tmp_path / "corpus.jsonl", [r | {"text": r["text"] + " w5 w9"} for r in rows])
    after = eutectic.evaluate(tasks, models=[folder], output=tmp_path / "r.json")
    assert before.tasks[0].data_hash != after.tasks[0].data_hash
    assert before.results[0].value != after.results[0].value


def test_command_and_draft(tmp_path: Path):
    base = sentence_model(tmp_path / "base")
    expert = sentence_model(tmp_path / "sre", seed=2)
    tasks = retrieval(tmp_path, expert="sre")
    words = ["evaluate", "--tasks", str(tasks), "--base", str(base), "-e", f"sre={expert}"]
    done = invoke(*words, "--json")
    values = {r["checkpoint"]: r["value"] for r in json.loads(done.out)["results"]}
    assert set(values) == {"base", "sre"} and values["base"] != values["sre"]

    pair_file(tmp_path / "sre.test.jsonl")
    drawn = draft([base, expert], tmp_path, base=str(base))
    assert "kind: sentence-similarity  # by its modules.json" in drawn.tasks
    (tmp_path / "sre.test.jsonl").write_text((tmp_path / "queries.jsonl").read_text())
    drawn = draft([base, expert], tmp_path, base=str(base))
    assert "kind: retrieval" in drawn.tasks and "    corpus: ./corpus.jsonl\n" in drawn.tasks
    assert not drawn.open
    (tmp_path / "tasks.yaml").write_text(drawn.tasks)
    assert load_tasks(tmp_path / "tasks.yaml")["sre"].kind == "retrieval"
    (tmp_path / "corpus.jsonl").unlink()
    drawn = draft([base, expert], tmp_path, base=str(base))
    assert "corpus: sre/corpus.jsonl  # EDIT" in drawn.tasks
    assert any("corpus" in line for line in drawn.open)
    world.jsonl(tmp_path / "sre.test.jsonl", [{"text": "w1", "label": "a"}])
    drawn = draft([base, expert], tmp_path, base=str(base))
    assert "kind: text-classification  # EDIT" in drawn.tasks


def test_routed_models_are_measured(tmp_path: Path):
    """With its experts off a routed model is the merged one, Dense modules and all."""
    base = sentence_model(tmp_path / "base", "cls_token", dense=6)
    experts = {
        n: sentence_model(tmp_path / n, "cls_token", dense=6, seed=s)
        for n, s in (("a", 3), ("b", 4))
    }
    merged = tmp_path / "merged"
    eutectic.merge(base=base, experts=experts, method="average", output=merged)
    files = {}
    for name, folder in experts.items():
        texts = world.jsonl(tmp_path / f"{name}.jsonl", [{"text": t} for t in world.sentences(24)])
        files[name] = tmp_path / f"{name}.stats.safetensors"
        done = invoke("collect", folder, "--data", texts, "-o", files[name])
        assert done.code == 0, done.err
    words = [f"{name}={folder}" for name, folder in experts.items()]
    words += [w for name, file in files.items() for w in ("-s", f"{name}={file}")]
    words += ["--rank", "2", "--router", "prototype", "-o", tmp_path / "routed"]
    done = invoke("route", merged, *words, "--export", tmp_path / "export")
    assert done.code == 0, done.err
    dense = merged / "2_Dense" / "model.safetensors"
    for folder in (tmp_path / "routed", tmp_path / "export" / "merged"):
        assert (folder / "2_Dense" / "model.safetensors").read_bytes() == dense.read_bytes()
        assert (folder / "modules.json").read_bytes() == (merged / "modules.json").read_bytes()
        assert (folder / "1_Pooling" / "config.json").is_file()
    data = pair_file(tmp_path / "pairs.jsonl")
    tasks = world.tasks(tmp_path / "t.yaml", a={"kind": "sentence-similarity", "data": str(data)})
    values = [
        eutectic.evaluate(tasks, models=[folder], base=base, **options).results[-1].value
        for folder, options in (
            (merged, {}),
            (tmp_path / "routed", {"routing": "base"}),
            (tmp_path / "routed", {"routing": "oracle"}),
        )
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert values[2] != values[1]
    (tmp_path / "routed" / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="2_Dense .* has no weight .*\n.*Copy its folder there"
    ):
        eutectic.evaluate(tasks, models=[tmp_path / "routed"])
